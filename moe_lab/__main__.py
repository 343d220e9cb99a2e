"""examples:
  python -m moe_lab notebook 05 profile=smoke               execute a notebook; `all` for the whole course
  python -m moe_lab run configs/lab.yaml training.steps=50  train one config
  python -m moe_lab preflight configs/lab.yaml              look for mistakes before a second of compute
  python -m moe_lab plan configs/training_1.5b.yaml         what a run will take, before it takes anything
  python -m moe_lab inspect runs/…/step_000200.pt           look into a checkpoint; nothing in it is executed
  python -m moe_lab doctor train.py --lr 3e-4               run any training script, watched; -m MODULE works too

Each command has a --help of its own; errors are one line, exit code 2. `make lab` opens the notebooks in JupyterLab.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

from moe_lab.config import SECTIONS, ConfigError, load_config
from moe_lab.course import case
from moe_lab.course.notebook import new_run_dir
from moe_lab.health.after.inspection import inspect_checkpoint
from moe_lab.health.before.plan import Plan
from moe_lab.health.before.preflight import preflight, read_entries
from moe_lab.health.during import doctor
from moe_lab.health.during.watch import Watch
from moe_lab.health.findings import SEVERITIES, Finding, counts
from moe_lab.model.count import count_parameters
from moe_lab.plan import lines
from moe_lab.train import Trainer
from moe_lab.train.command import exit_code, fit_watched
from moe_lab.train.device import choose_threads
from moe_lab.train.record import FINDINGS, commit

HEALTH_SCHEMA = {"sections": tuple(SECTIONS), "dead_keys": case.case()["dead_keys"]}


def run(args: argparse.Namespace) -> int:
    """Returns 1 if preflight or the watch found an error."""
    if args.resume and not args.run_dir:
        raise ConfigError("--resume needs --run-dir: the directory of the run to go on with")
    config = load_config(args.config, args.overrides)
    if busy := choose_threads(config):
        print(busy, file=sys.stderr)
    trainer = Trainer(config, args.run_dir or new_run_dir(Path(args.config).stem), resume=args.resume)
    before = preflight_of(args.config)
    for finding in before:
        print(line_of(finding), file=sys.stderr)
    with trainer.opened():  # from here on no other process writes there
        status, findings = fit_watched(trainer, Watch)
    print(f"{status}: {trainer.step} steps in {trainer.run_dir}; see record.jsonl and summary.json")
    print(counts(f.severity for f in findings) + (f": see {trainer.run_dir / FINDINGS}" if findings else ""))
    return int(any(finding.severity == "error" for finding in before + findings))


def preflight_of(path: str) -> list[Finding]:
    """Preflight, handed what the lab knows of its own configs: the model's size, and keys that nothing reads."""
    try:
        n_parameters = count_parameters(load_config(path).model).total
    except ConfigError:
        n_parameters = None  # another project's file, or one that the lab refuses: estimated from its sizes
        if not Plan(read_entries(Path(path))).is_training():
            raise ConfigError(f"{path}: not a training config: it has none of the keys that such a file has") from None
    return preflight(path, n_parameters, HEALTH_SCHEMA)


def check_file(args: argparse.Namespace) -> int:
    """Print a line for each finding about a file, errors first, and their counts. Returns 1 for an error."""
    try:
        findings = sorted(args.check(args.file), key=lambda finding: SEVERITIES.index(finding.severity))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if unreadable := next((finding for finding in findings if finding.rule == "unreadable"), None):
        raise ConfigError(f"{unreadable.where}: {unreadable.message}; {unreadable.advice}")
    for finding in findings:
        print(line_of(finding))
    print(counts(finding.severity for finding in findings))
    return int(any(finding.severity == "error" for finding in findings))


def plan(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.overrides)
    for line in lines(config, args.tflops, args.utilisation, args.price, args.ranks):
        print(line, flush=True)  # one by one: of a large model each takes seconds


def line_of(f: Finding) -> str:
    return " ".join(f"{f.severity}: {f.rule}: {f.where}: {f.message}. {f.advice}".split())


def notebook(args: argparse.Namespace) -> None:
    try:
        from moe_lab.course import runner
    except ModuleNotFoundError as error:
        raise ConfigError(f"notebooks need {error.name}; `make setup` in a clone installs it") from error
    for word in args.overrides:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not understood; write: notebook PATH [NAME=VALUE …]")
    parameters = dict(word.split("=", 1) for word in args.overrides)
    if args.path == "all":
        runner.run_all(parameters)
    else:
        runner.run_notebook(args.path, parameters)


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its whole usage before an error; one line is enough."""

    def error(self, message: str):
        message = message.replace(", section.key=value", "").replace(", NAME=VALUE", "")  # they are not required
        raise ConfigError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    top = OneLineParser(prog="python -m moe_lab", description="Train and look into training runs.", epilog=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    top.add_argument("--version", action="store_true", help="print the version and the commit")
    commands = top.add_subparsers(dest="command", required=True)
    codes = "Exit code 0: no error was found; 1: one was, before the run or during it; 2: it cannot run."
    one = commands.add_parser("run", help="train one config", description=codes)
    one.add_argument("--run-dir", help="where to write; default: a new dated directory under runs/")
    one.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    one.set_defaults(call=run)
    more = commands.add_parser("plan", help="what a run will take: parameters, operations, memory, time, money")
    more.add_argument("--ranks", type=int, default=1, help="GPUs over which FSDP shards; default: 1")
    more.add_argument("--tflops", type=float, default=989, help="of one GPU in bf16; default: an H100's 989")
    more.add_argument("--utilisation", type=float, default=0.3, help="share of them that is used; default: 0.3")
    more.add_argument("--price", type=float, default=3.0, help="of one GPU for an hour; default: 3")
    more.set_defaults(call=plan)
    for command in (one, more):
        command.add_argument("config", help="a YAML file, such as configs/lab.yaml")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as training.steps=200")
    codes = "Prints a line for each finding. Exit code 0: no error among them; 1: an error; 2: the file cannot be used."
    for name, check, purpose in (
        ("preflight", preflight_of, "look for mistakes in a YAML config, its comments too, before training"),
        ("inspect", inspect_checkpoint, "look into a checkpoint; nothing in it is executed"),
    ):
        one = commands.add_parser(name, help=purpose, description=codes)
        one.add_argument("file")
        one.set_defaults(call=check_file, check=check)
    one = commands.add_parser("doctor", help="run a training script of your own, watched")
    one.add_argument("script", help="train.py [its arguments], or -m MODULE [its arguments]; its exit code is kept")
    codes = "Exit code 0: every cell passed; 2: one did not, or it cannot run; 130: Ctrl-C; what was trained is saved."
    one = commands.add_parser("notebook", help="execute a notebook headlessly", description=codes)
    one.add_argument("path", help="a notebook's number, name or path (05, 05_fixed_training, notebooks/05…), or all")
    one.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="its parameters, such as profile=smoke")
    one.set_defaults(call=notebook)
    return top


def command(argv: list[str] | None) -> int | None:
    known, argv = parser(), sys.argv[1:] if argv is None else argv
    if "--version" in argv[:1]:
        print(f"moe_lab {version('moe-lab')}, commit {commit() or 'unknown'}")
        return 0
    if not argv:
        known.print_help()
        return 2
    args, rest = known.parse_known_args(argv)  # argparse leaves over what follows an option
    if rest and "overrides" not in args:
        known.error(f"unrecognized arguments: {' '.join(rest)}")
    vars(args).setdefault("overrides", []).extend(rest)
    return args.call(args)


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["doctor"] and given[1:] not in (["-h"], ["--help"]):
        return doctor.command(given)  # the script's errors and Ctrl-C are its own
    return exit_code(command, argv)


if __name__ == "__main__":
    sys.exit(main())
