"""Each bug that the report missed under each check, three seeds, and healthy runs beside them: `python -m benchmarks.bug_matrix`.

A row is a run of 100 updates, or fewer where the bug shows at once, of a small model with every mixture. Every check is called
on every run, as a user would call it; what it says of at least `warning` is kept, and an `info` where the bug is no more than
one. Which rules are a bug's name stands in notebooks/checks/matrix_06.py. Ten minutes of one core; the result is
notebooks/results/bugs_matrix.json.

    python -m benchmarks.bug_matrix B04 B19   # these rows alone, printed and not kept
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bug_study import DAY, OFF, at_rate, healthy
from moe_lab import Trainer, load_config, optim
from moe_lab.config import ROOT, Config, to_yaml
from moe_lab.course import case
from moe_lab.data import validation_windows
from moe_lab.failures import bugs
from moe_lab.failures.bugs import planted
from moe_lab.failures.results import RESULTS, provenance, write_json
from moe_lab.health import (
    Watch,
    check_causality,
    check_data,
    check_train_eval,
    dry_run,
    examine,
    inspect_checkpoint,
    preflight,
)
from moe_lab.health.findings import Finding
from moe_lab.health.sampling import start_sample
from moe_lab.train import evaluate
from moe_lab.train.checkpoint import step_path

NAME = "bugs_matrix"
SEEDS, UPDATES, RESUMED = (0, 1, 2), 100, 40
EARLY = 30  # updates of a row whose bug can be seen before the first one, or in the first few
SERIOUS = ("error", "warning")
BY_NATURE = ("weight_decay_on_norms", "rough_positions")  # an info says all that there is to say of these


class Run(NamedTuple):
    """One run, as the checks find it."""

    trainer: Trainer  # before its first update
    folder: Path  # config.yaml, as its author left it
    bugs: tuple[str, ...]


class Row(NamedTuple):
    """How a row is made."""

    bugs: tuple[str, ...] = ()
    config: Callable[[Config], Config] = lambda config: config
    comments: dict[str, str] = {}  # beside a key of the file
    keys: str = ""  # more lines of the section `training`
    settings: tuple[str, ...] = ()  # bugs that are none of the code
    updates: int = 100


def lines(config: Config, row: Row) -> str:
    text = to_yaml(config).splitlines()
    for key, comment in row.comments.items():
        text = [f"{line}  # {comment}" if line.strip().startswith(f"{key}:") else line for line in text]
    return "\n".join(text).replace("training:\n", f"training:\n{row.keys}", 1) + "\n"


def bf16(config: Config) -> Config:
    return config.with_(precision={"parameters": "bfloat16"})


def small(name: str) -> Config:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    return config.with_(training={"device": "cpu"}, data={"max_bytes": 2_000_000})


def in_parts(config: Config) -> Config:
    return config.with_(training={"batch_size": 2, "gradient_accumulation_steps": 4})


def that_day(*bugs: str) -> Row:
    return Row(
        (*bugs, "B07", "B12", "B20", "B22", "B26"),
        config=lambda c: at_rate(bf16(in_parts(c)), 3e-4),
        comments={"max_lr": "Lower for AdamW (use 0.001 for Muon)", "mod_enabled": "Disabled"},
        keys="  weight_decay: 0.1\n",
        settings=("B01", "B02", "B23"),
    )


ROWS: dict[str, Row] = {
    "healthy": Row(),
    "healthy, MoD off": Row(config=lambda c: c.with_(model=OFF["MoD off"])),
    "healthy, both off": Row(config=lambda c: c.with_(model=OFF["both off"])),
    "healthy, AdamW alone": Row(
        config=lambda c: c.with_(training={"max_lr": 4e-3}, optimizer={"type": "adamw", "embedding_lr_ratio": None})
    ),
    "healthy, profile smoke": Row(config=lambda c: small("smoke")),
    "healthy, resumed": Row(),
    "B01": Row(config=bf16),
    "B02": Row(config=lambda c: at_rate(c, 3e-4), comments={"max_lr": "Lower for AdamW (use 0.001 for Muon)"}),
    **{f"B{n:02d}": Row((f"B{n:02d}",)) for n in (13, 15, 22)},
    **{f"B{n:02d}": Row((f"B{n:02d}",), updates=EARLY) for n in (3, 4, 5, 6, 8, 9, 10, 11, 16, 17, 18, 19, 21, 24, 25, 26)},
    "B07": Row(("B07",), config=in_parts),
    "B12": Row(("B12",), config=in_parts),
    "B20": Row(("B20",), keys="  weight_decay: 0.1\n", updates=EARLY),
    "B23": Row(comments={"mod_enabled": "Disabled"}, updates=EARLY),
    "all of that day": that_day(*DAY, "B08"),
    # random tokens hide what is wrong with the text, and a block without a state does not use its time steps
    "all of that day, but B08 and B09": that_day(*(id for id in DAY if id != "B09")),
}  # fmt: skip


def serious(findings: Iterable[Finding] | Finding | None) -> list[dict[str, Any]]:
    """What is kept."""
    found = [findings] if isinstance(findings, Finding) else findings or []
    kept = [f for f in found if f.severity in SERIOUS or f.rule in BY_NATURE]
    return [{"rule": f.rule, "severity": f.severity, "step": f.step, "message": f.message} for f in kept]


# ---- the calls, as a user would make them ------------------------------------------------------------------------------


def pair(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids[:, :-1], ids[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, labels = batch
    return sum(model.losses(torch.cat([ids, labels[:, -1:]], dim=1)).values())


def next_batches(run: Run, n: int = 64) -> list[tuple[Tensor, Tensor]]:
    """What the run would read next; it still does."""
    state = run.trainer.batches.state_dict()
    found = [pair(run.trainer.batches.next_batch()) for _ in range(n)]
    run.trainer.batches.load_state_dict(state)
    return found


def call_preflight(run: Run) -> list[Finding]:
    return preflight(run.folder / "config.yaml", schema={"dead_keys": case.case()["dead_keys"]})


def call_check_data(run: Run) -> list[Finding]:
    config, dataset = run.trainer.config, run.trainer.dataset
    windows = islice(validation_windows(dataset.validation, config.model.max_seq_len, 8), 64)
    return check_data(next_batches(run), config.model.vocab_size, validation=list(map(pair, windows)))


def call_examine(run: Run) -> list[Finding]:
    """With the optimizers as they are at the first update: the trainer sets their learning rates when it gets there."""
    trainer, training = run.trainer, run.trainer.config.training
    share = optim.lr_share(1, trainer.n_steps, training.warmup_steps, training.min_lr_ratio)
    for group in optim.groups_of(trainer.optimizers):
        group["lr"] = share * group["initial_lr"]
    (batch,) = next_batches(run, 1)
    return examine(trainer.model, batch, loss_of, trainer.optimizers, run.folder / "config.yaml").findings


def call_check_causality(run: Run) -> Finding | None:
    model = run.trainer.model.eval()
    return check_causality(model, run.trainer.config.model.vocab_size, 24)


def call_check_train_eval(run: Run) -> Finding | None:
    model = run.trainer.model
    (batch,) = next_batches(run, 1)
    return check_train_eval(lambda b: model.train()(b[0]), lambda b: model.eval()(b[0]), batch)


def call_check_the_shown_loss(run: Run) -> Finding | None:
    """What evaluation shows, beside the next token's loss as one computes it oneself from the same text."""
    trainer, n = run.trainer, run.trainer.config.model.max_seq_len
    tokens = trainer.dataset.validation[: 8 * n + 1]

    def own(ids: Tensor) -> Tensor:
        logits = trainer.model.lm_heads[0](trainer.model.eval().trunk(ids[:, :-1]).hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def shown(ids: Tensor) -> Tensor:
        return torch.tensor(evaluate.evaluate(trainer.model, tokens, 8, trainer.autocast)["validation_loss"])

    (windows,) = validation_windows(tokens, n, 8)
    return check_train_eval(own, shown, windows)


def call_dry_run(run: Run) -> list[Finding]:
    """The run's own loop with next to no model; B07's is one of its own."""
    found = dry_run(lambda on: bugs.loop(754, 4, 10, on), 188) if "B07" in run.bugs else []
    cheap: dict[str, Any] = {"d_model": 8, "n_heads": 2, "n_kv_heads": 1, "d_ff": 8, "n_layers": 1, "mamba_layers": ()}
    config = run.trainer.config.with_(
        model=cheap | {"moe_layers": (), "mod_enabled": False, "max_seq_len": 16},
        training={"steps": 24, "log_interval": 4, "eval_interval": 8, "save_interval": 12},
    )

    def loop(on: Callable[[str], object]) -> None:
        Trainer(config, run.folder / "dry", listeners=[lambda row: on("log") if "loss" in row else None]).fit()

    return [*found, *dry_run(loop, 24)]


BEFORE: dict[str, Callable[[Run], Any]] = {
    "dry_run": call_dry_run,
    "preflight": call_preflight,
    "check_data": call_check_data,
    "examine": call_examine,
    "check_causality": call_check_causality,
    "check_train_eval": call_check_train_eval,
    "check_train_eval, the shown loss": call_check_the_shown_loss,
}


def call_watch(run: Run, updates: int, start: int = 0) -> list[Finding]:
    trainer = run.trainer
    watch = Watch(trainer.model, trainer.optimizers, budget=trainer.n_steps, start_step=start, quiet=True)
    trainer.listeners.append(lambda row: watch.observe(loss=row["loss"]) if "loss" in row else None)
    for _ in trainer.steps(until=min(start + updates, trainer.n_steps)):
        pass
    watch.close()
    return watch.findings


def call_inspect(run: Run) -> list[Finding]:
    path = run.folder / "end.pt"
    run.trainer.save(path)
    return inspect_checkpoint(path)


def call_inspect_micro_steps(run: Run) -> list[Finding]:
    """B07: the checkpoint of a loop whose steps are micro-batches."""
    path = run.folder / "end.pt"
    run.trainer.save(path)
    state = torch.load(path)
    torch.save(state | {"step": state["step"] * run.trainer.config.training.gradient_accumulation_steps}, path)
    return inspect_checkpoint(path)


def call_inspect_untouched(run: Run) -> list[Finding]:
    """B16: what the diagnosis looked at, a checkpoint; here one that no update has touched."""
    state = {"model_state_dict": run.trainer.model.state_dict(), "initial_sample": start_sample(run.trainer.model)}
    torch.save(state | {"step": 100}, run.folder / "untouched.pt")
    return inspect_checkpoint(run.folder / "untouched.pt")


# ---- a row -----------------------------------------------------------------------------------------------------------------


def start(name: str, row: Row, config: Config, folder: Path) -> tuple[Trainer, list[tuple[Tensor, Tensor]]]:
    """The trainer, and what was read before it. B13, B25 and their control go on from a checkpoint that healthy code wrote; B13's was
    made at the case's learning rates."""
    if name not in ("healthy, resumed", "B13", "B25"):
        return Trainer(config, folder / "run"), []
    earlier = Trainer(at_rate(config, 3e-4) if name == "B13" else config, folder / "run")
    read = next_batches(Run(earlier, folder, ()), 32)
    with earlier.opened():
        for _ in earlier.steps(until=RESUMED):
            pass
        earlier.save(step_path(folder / "run", RESUMED))
    with planted(*row.bugs):
        return Trainer(config, folder / "run", resume=True), read


def measured(name: str, seed: int) -> list[dict[str, Any]]:
    """What every call says of one run."""
    row, found = ROWS[name], []

    def ask(call: str, check: Callable[[], Any]) -> None:
        try:
            findings = serious(check())
        except Exception as error:  # a check that cannot be made of this run is no finding
            findings = [{"rule": "", "severity": "", "step": None, "message": f"not made: {error}"}]
        found.append({"row": name, "seed": seed, "call": call, "findings": findings})

    resumed = name in ("healthy, resumed", "B13", "B25")
    config = row.config(healthy()).with_(training={"steps": UPDATES, "seed": seed, "save_interval": 10**6})
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(temporary)
        (folder / "config.yaml").write_text(lines(config, row), encoding="utf-8")
        with contextlib.nullcontext() if resumed else planted(*row.bugs):
            trainer, read = start(name, row, config, folder)
            run = Run(trainer, folder, row.bugs)
            for call, check in BEFORE.items():
                ask(call, lambda check=check: check(run))
            if resumed:
                ask("inspect_checkpoint", lambda: inspect_checkpoint(step_path(folder / "run", RESUMED)))
                ask("check_data, both sides of the resume", lambda: check_data([*read, *next_batches(run, 32)]))
            if name == "B16":
                ask("inspect_checkpoint", lambda: call_inspect_untouched(run))
            ask("Watch", lambda: call_watch(run, row.updates, RESUMED if resumed else 0))
            if not resumed and name != "B16":
                ask("inspect_checkpoint", lambda: (call_inspect_micro_steps if name == "B07" else call_inspect)(run))
    return found


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    rows = []
    for name in names or ROWS:
        for seed in SEEDS:
            rows += measured(name, seed)
            said = [
                f"{r['call']}: {f['rule']}@{f['step']}"
                for r in rows
                if (r["row"], r["seed"]) == (name, seed)
                for f in r["findings"]
            ]
            print(name, seed, said, flush=True)
    if not names:
        by_row = {name: sorted((*row.bugs, *row.settings)) for name, row in ROWS.items()}
        write_json(RESULTS / f"{NAME}.json", {"provenance": provenance(), "planted": by_row, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
