"""The command line: wrong input ends in one line that names it, exit code 2, and nothing written; what is found, in 1."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_run import CONFIGS, contents, tiny

from moe_lab import Trainer
from moe_lab import __main__ as command_line
from moe_lab.__main__ import main
from moe_lab.config import ROOT, to_yaml

SMOKE = str(CONFIGS / "smoke.yaml")
NOTEBOOK, README = str(ROOT / "notebooks" / "00_start_here.ipynb"), str(ROOT / "README.md")


def command_of(folder: Path, **changes: dict) -> list[str]:
    """`run` of a tiny config in `folder`, in its folder `run`."""
    (folder / "c.yaml").write_text(to_yaml(tiny(folder, **changes)))
    return ["run", str(folder / "c.yaml"), "--run-dir", str(folder / "run")]


def call(*argv: str) -> tuple[int, str, str]:
    """Exit code, what went to stdout, what went to stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(list(argv))
    return code, out.getvalue(), err.getvalue()


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run", "nothing.yaml"], "nothing.yaml: no such file"),
        (["run", SMOKE, "training.step=3"], "override: unknown key training.step; did you mean steps?"),
        (["run", SMOKE, "data.source=no/text"], "data.source=no/text: no such file or folder; write stdlib, a path"),
        (["run", SMOKE, "--run-dir", "run", "--resume"], "run: nothing to resume from, checkpoints/ holds no whole"),
        (["run", SMOKE, "--resume"], "--resume needs --run-dir: the directory of the run to go on with"),
        (["run"], "the following arguments are required: config; see python -m moe_lab run --help"),
        (["run", "a.yaml", "--run-dir"], "argument --run-dir: expected one argument; see python -m moe_lab run --help"),
        (["run", SMOKE, "--run-dri", "x"], "override '--run-dri' must read section.key=value"),
        (["--resume"], "the following arguments are required: command; see python -m moe_lab --help"),
        (["rnu"], "argument command: invalid choice: 'rnu'"),
        (["preflight"], "the following arguments are required: file; see python -m moe_lab preflight --help"),
        (["preflight", "a.yaml", "b.yaml"], "unrecognized arguments: b.yaml; see python -m moe_lab --help"),
        (["preflight", "nothing.yaml"], "nothing.yaml: no such file"),
        (["preflight", NOTEBOOK], f"{NOTEBOOK}: not a training config: it has none of the keys"),
        (["notebook"], "the following arguments are required: path; see python -m moe_lab notebook --help"),
        (["notebook", "05", "smoke"], "'smoke' is not understood; write: notebook PATH [NAME=VALUE …]"),
        (["notebook", "55"], "55: no such notebook; there are 00_start_here, "),
        (["inspect", "--x", "a"], "unrecognized arguments: --x"),
        (
            ["inspect", README],
            f"{README}: not a checkpoint that can be inspected: it is cut short, damaged, or no file",
        ),
        (["inspect", "none.pt"], "none.pt: no such file; give the path of a checkpoint"),
    ],
    ids=" ".join,
)
def test_a_wrong_command(argv, expected: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("training began"))
    code, out, err = call(*argv)
    assert (code, out, err.count("\n"), err[-1]) == (2, "", 1, "\n") and err.startswith(f"error: {expected}")
    assert not list(tmp_path.iterdir()), "something was written"


def test_an_installed_package_writes_where_it_is_started_and_knows_no_commit(tmp_path: Path) -> None:
    """Copied into the site-packages of an environment that lies in somebody else's repository, and started elsewhere."""
    site = tmp_path / "project" / "site-packages"
    shutil.copytree(ROOT / "moe_lab", site / "moe_lab", ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.email=a@b", "-c", "user.name=a"]
    for git in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "not ours"]):
        subprocess.run(["git", *git], cwd=tmp_path / "project", check=True)
    (tmp_path / "elsewhere").mkdir()
    code = "from moe_lab.data.prepare import CACHE; from moe_lab.train.record import commit; print(CACHE, commit()); "
    code += (
        "import runpy, sys; sys.argv[1:] = ['run', 'nothing.yaml']; runpy.run_module('moe_lab', run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: nothing.yaml: no such file\n")
    assert done.stdout == f"{tmp_path / 'elsewhere' / '.cache'} None\n"
    assert not list((tmp_path / "elsewhere").iterdir())


# ---- run -------------------------------------------------------------------------------------------------------------


def test_a_run_says_where_it_is(tmp_path: Path) -> None:
    command, run_dir = command_of(tmp_path), tmp_path / "run"
    code, out, _ = call(*command, "training.steps=2", "training.max_lr=1e-2")  # overrides may follow an option
    lines = [f"finished: 2 steps in {run_dir}; see record.jsonl and summary.json"]
    lines += [f"0 errors, 0 warnings, 1 info: see {run_dir / 'findings.jsonl'}"]
    assert (code, out.splitlines()) == (0, lines)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["findings"] == []  # watched; what follows is found at the end
    (found,) = map(json.loads, (run_dir / "findings.jsonl").read_text().splitlines())
    assert (found["rule"], found["severity"]) == ("future_leak", "info")  # MoD chooses over time, as is meant
    code, _, err = call(*command)
    assert code == 2 and "resume=True (--resume on the shell), or take another directory" in err
    code, out, err = call(*command[:2], "training.steps=3", *command[2:], "--resume")
    assert code == 0 and out.startswith("finished: 3 steps") and "training.steps: stored 2, given 3" in err


def test_a_run_ends_with_1_for_what_preflight_found_alone(tmp_path: Path) -> None:
    """Two updates are too few for the watch to find more than that MoD chooses over time."""
    code, out, err = call(*command_of(tmp_path, precision={"parameters": "bfloat16"}, training={"steps": 2}))
    assert code == 1 and out.splitlines()[-1].startswith("0 errors, 0 warnings, 1 info: see ")
    (found,) = map(json.loads, (tmp_path / "run" / "findings.jsonl").read_text().splitlines())
    assert found["rule"] == "future_leak"
    before_training = err[: err.index("step 0: validation loss")]
    assert re.search(rf"^error: bf16_parameters: {tmp_path}/c.yaml:\d+: \S", before_training, re.MULTILINE)


def test_nothing_is_written_into_a_run_that_another_process_holds(tmp_path: Path, monkeypatch) -> None:
    command = command_of(tmp_path, training={"steps": 2})
    assert call(*command)[0] == 0
    monkeypatch.setattr(command_line, "Watch", lambda *given, **options: pytest.fail("a watch opened its log"))
    before = contents(tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"):
        code, _, err = call(*command, "--resume")
    assert code == 2 and "another process trains here; wait for it" in err
    assert contents(tmp_path / "run") == before


def test_a_run_that_was_killed_has_the_findings_of_one_that_was_not(tmp_path: Path) -> None:
    """Steps count from the run's first update; nothing is told twice; what came after the checkpoint, at 36, is cut."""
    training = {"steps": 48, "max_lr": 1e-3, "eval_interval": 48, "save_interval": 36}
    command, run_dir = command_of(tmp_path, precision={"parameters": "bfloat16"}, training=training), tmp_path / "run"
    log, summary = run_dir / "findings.jsonl", run_dir / "summary.json"
    code, out, err = call(*command)
    assert code == 1 and out.endswith(f"see {log}\n") and "lost_updates: bfloat16 rounds updates away" in err
    whole = log.read_text()
    findings = [json.loads(line) for line in whole.splitlines()]
    assert "lost_updates" in {finding["rule"] for finding in findings}
    assert 20 in {finding["step"] for finding in findings}
    assert all(finding["step"] < 36 for finding in findings), "what is under way there would be found later"
    assert json.loads(summary.read_text())["findings"] == findings
    (run_dir / "checkpoints" / "step_000048.pt").unlink()
    summary.unlink()
    beyond = findings[-1] | {"step": 40, "message": "found between the checkpoint and the kill"}
    log.write_text(whole + json.dumps(beyond) + "\n" + '{"rule": "cut sh')
    assert call(*command, "--resume")[0] == 1
    assert log.read_text() == whole
    assert json.loads(summary.read_text())["findings"] == findings


# ---- preflight and inspect -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code", "counts"),
    [
        ("lab", 0, "0 errors, 0 warnings, 0 info"),
        ("training_1.5b_as_reported", 1, "1 error, 2 warnings, 0 info"),
    ],
)
def test_preflight_of_our_configs(name: str, code: int, counts: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    got, out, err = call("preflight", str(path))
    *lines, last = out.splitlines()
    assert (got, last, err) == (code, counts, "")
    assert len(lines) == sum(int(number) for number in re.findall(r"\d+", counts))
    assert all(re.match(rf"(error|warning|info): \w+: {re.escape(str(path))}:\d+: \S", line) for line in lines)
    severities = [line.split(":")[0] for line in lines]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)


def test_inspect(tmp_path: Path) -> None:
    torch.save({"model": {"norm.weight": torch.ones(4), "x": torch.tensor([1.0, 2.0])}}, tmp_path / "a.pt")
    torch.save({"model": {"x": torch.tensor([1.0, torch.nan])}}, tmp_path / "b.pt")
    code, out, err = call("inspect", str(tmp_path / "a.pt"))
    assert (code, out.splitlines()[-1], err) == (0, "0 errors, 1 warning, 1 info", "")
    assert out.startswith("warning: never_moved: norm.weight: 1 of 1 norm weights: exactly 1 in every element")
    code, out, err = call("inspect", str(tmp_path / "b.pt"))
    assert (code, out.splitlines()[-1], err) == (1, "1 error, 0 warnings, 1 info", "")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.ones(4)}}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:600])
    torch.save({"step": 3}, tmp_path / "no_tensors.pt")
    for name, reason in (("cut", "it is cut short, damaged, or"), ("no_tensors", "it holds no tensors by name")):
        code, out, err = call("inspect", str(tmp_path / f"{name}.pt"))
        assert (code, out, err.count("\n")) == (2, "", 1) and reason in err and "use another checkpoint" in err


@pytest.mark.parametrize("text", ["data: {source: stdlib}", "train: {learning_rate: 1e-3}", "optimizer: adamw"])
def test_a_config_of_few_keys_is_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert call("preflight", str(tmp_path / "c.yaml")) == (0, "0 errors, 0 warnings, 0 info\n", "")


# ---- help ------------------------------------------------------------------------------------------------------------


def helped(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_main_help_shows_every_command_and_so_does_no_command(capsys) -> None:
    shown = helped(capsys)
    for name in ("run", "preflight", "inspect", "notebook"):
        assert f"python -m moe_lab {name}" in shown
    code, out, err = call()
    assert (code, " ".join(out.split()), err) == (2, shown, "")


def test_the_help_of_notebook_names_what_it_takes(capsys) -> None:
    shown = helped(capsys, "notebook")
    assert "number, name or path (05, 05_fixed_training, notebooks/05…), or all" in shown and "NAME=VALUE" in shown


def test_version() -> None:
    code, out, err = call("--version")
    assert (code, err) == (0, "") and re.fullmatch(r"moe_lab \d+\.\d+\.\d+, commit \S+\n", out)


@pytest.mark.parametrize("command", ["preflight", "inspect"])
def test_the_help_names_the_exit_codes(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "Exit code 0: no error among them; 1: an error; 2: the file cannot be used." in text
