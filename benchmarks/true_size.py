"""The case's own model at its own size, on a CPU: predicted from narrow copies of it, then run.

    python -m benchmarks.true_size predict     # widths 96, 192, 384 → the prediction, in notebooks/results
    python -m benchmarks.true_size case        # 20 updates of 4 × 1024 tokens in bf16; refuses to start without the prediction
    python -m benchmarks.true_size cure        # 3 updates with fp32 parameters; needs 23 GB, nearly alone

`configs/training_1.5b_as_reported.yaml` with three changes that are said beside each number: the embedded corpus, whose text
fills 35 thousand of the 50,257 rows; no warm-up, since 20 updates of it would run at a tenth of the LR; blocks recomputed in
the backward pass, which changes no number. The cure changes one thing more: parameters in float32.

A run goes on from its last checkpoint (one every few updates and when a stop is asked for, 7 or 20 GB in .cache); what each
update showed is kept at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.true_width.true_width import line_at
from moe_lab import plan
from moe_lab.config import ROOT, Config, ConfigError, load_config
from moe_lab.data.prepare import CACHE
from moe_lab.failures.results import RESULTS, plain, provenance, write_json
from moe_lab.health import Watch
from moe_lab.health.during.rule import by_kind
from moe_lab.health.measures import expected_start, share_of
from moe_lab.model import build_model
from moe_lab.optim import Muon
from moe_lab.train import RunError, Trainer, read_record
from moe_lab.train.checkpoint import FOLDER, step_path
from moe_lab.train.command import exit_code
from moe_lab.train.controls import signals_ask_to_stop
from moe_lab.train.record import FINDINGS, append_jsonl, read_jsonl

RESULT = RESULTS / "true_size.json"
WIDTH, NARROW = 1536, (96, 192, 384)
N_MATRICES = 14  # under Muon whose steps are replayed: then 12 of its 14 kinds of matrix are among them
UPDATES = {"case": 20, "cure": 3}
MARKS = (10, 20)  # updates after which shares are compared
SAVE_EVERY = {"case": 5, "cure": 3}
LEFT = 1.0  # GB of memory below which the run ends, rather than the machine


def size_config(d_model: int = WIDTH, parameters: str = "bfloat16", updates: int = 20) -> Config:
    """The case as reported, or a narrow copy of it: an element under Muon then moves as far an update as at the true width
    (LR × sqrt(width), `benchmarks.true_width`), and one under AdamW does anyway."""
    config = load_config(ROOT / "configs" / "training_1.5b_as_reported.yaml", ["data.source=stdlib"])
    lr, ratio = config.training.max_lr, config.optimizer.adamw_lr_ratio
    narrow = (d_model / WIDTH) ** 0.5
    return config.with_(
        model={"d_model": d_model, "d_ff": 8 * d_model // 3, "d_ff_expert": 4 * d_model // 3},
        training={"steps": updates, "max_lr": lr * narrow, "warmup_steps": 0, "min_lr_ratio": 1.0, "log_interval": 1}
        | {"keep_checkpoints": 1, "activation_checkpointing": True, "device": "cpu"},
        optimizer={"adamw_lr_ratio": ratio / narrow},
        precision={"parameters": parameters, "compute": "bfloat16"},
    )


def run(config: Config, run_dir: Path, save_every: int) -> dict[str, Any]:
    """Train to `training.steps`, going on from the last checkpoint; what it showed, row by row."""
    if config.n_steps in {row["step"] for row in read_jsonl(run_dir / "updates.jsonl")}:
        return collected(config, run_dir)
    threading.Thread(target=guard, daemon=True).start()
    resume = any((run_dir / FOLDER).glob("step_*.pt"))
    if not resume and (run_dir / "record.jsonl").exists():
        raise RunError(f"{run_dir}: holds updates and no checkpoint to go on from; move it away")
    model = build_model(config.model, config.training.seed)  # ready-made: the text alone would fill fewer rows
    trainer = Trainer(config, run_dir, resume=resume, model=model)
    if config.precision.parameters == "float32":
        map_moments(trainer.optimizers, run_dir / "moments")
    made = provenance() | {"corpus": trainer.dataset.corpus_hash, "threads": torch.get_num_threads()}
    with trainer.opened(), signals_ask_to_stop(trainer.controls):
        watch = Watch(
            trainer.model,
            trainer.optimizers,
            budget=trainer.n_steps,
            start_step=trainer.step,
            log=run_dir / FINDINGS,
            n_matrices=N_MATRICES,
        )
        cpu, wall = time.process_time(), time.perf_counter()
        for report in trainer.steps():
            loss = sum(term.item() for term in report.losses.values())
            watch.observe(loss=loss)
            row = {"step": report.step, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
            row |= {"shares": shares(watch)} if report.step in MARKS else {}
            row |= {"norm_deviation": trainer.readings.norm_deviation().item()} | memory() | made
            append_jsonl(run_dir / "updates.jsonl", [row | {"ended": now()}])
            print(f"{report.step}: loss {loss:.4f}, {row['wall_s']:.0f} s, {row['peak_gb']:.2f} GB", flush=True)
            if report.step % save_every == 0 and report.step < trainer.n_steps:
                trainer.save(step_path(run_dir, report.step))
            cpu, wall = time.process_time(), time.perf_counter()
        if trainer.step < trainer.n_steps:  # a stop was asked for
            trainer.save(step_path(run_dir, trainer.step))
        watch.close()
    return collected(config, run_dir)


def map_moments(optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Keep what the optimizers keep in files that the system pages in and out: in fp32 it is a third of what this machine has.
    Values are as before: zeros, or those of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    owned = [(o, p) for o in optimizers for group in o.param_groups for p in group["params"]]
    for number, (optimizer, p) in enumerate(owned):
        names = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
        state = optimizer.state[p]
        for name in names:
            path = folder / f"{number}_{name}.bin"
            mapped = torch.from_file(str(path), shared=True, size=p.numel(), dtype=p.dtype).view_as(p)
            state[name] = mapped.copy_(state[name]) if name in state else mapped.zero_()
        if "exp_avg" in state:
            state.setdefault("step", torch.zeros((), dtype=torch.float32))


def shares(watch: Watch) -> dict[str, dict[str, float]]:
    """Of each kind of tensor whose intended steps are known: ρ since the window began, its error, ULPs meant, share still."""
    watch.state.read()  # no rule is asked here
    table = {}
    for kind, mine in by_kind(watch.readings).items():
        touched = sum(t.n_touched for t in mine)
        if touched and (share := share_of(mine)):
            table[kind] = share._asdict() | {"still": sum(t.unchanged for t in mine) / touched, "tensors": len(mine)}
            table[kind]["window"] = watch.step - watch.state.window_start
    return table


def collected(config: Config, run_dir: Path) -> dict[str, Any]:
    """The result of a run directory, complete or not: its updates (the last row of each), its findings, what it was."""
    rows = {row["step"]: row for row in read_jsonl(run_dir / "updates.jsonl")}
    record = {row["step"]: row for row in read_record(run_dir)}
    kept = ("loss", "losses", "lr", "grad_norm")
    updates = [
        {**{key: record[step][key] for key in kept}, **row} for step, row in sorted(rows.items()) if step in record
    ]
    findings = read_jsonl(run_dir / FINDINGS)
    model = config.model
    what = {"d_model": model.d_model, "vocab_size": model.vocab_size, "parameters": config.precision.parameters}
    return what | {
        "updates": updates,
        "findings": findings,
        "expected_loss": expected_loss(config),
        "plan": planned(config),
    }


def expected_loss(config: Config) -> float:
    """ln V + var/2 of a token's loss at the start, nats: logits of normed states have the variance d_model · init_std²."""
    return expected_start(config.model.vocab_size, config.model.d_model * config.model.init_std**2)


def planned(config: Config) -> dict[str, Any]:
    return {"bytes": plan.memory(config)._asdict(), "flops": plan.flops(config)._asdict()}


def memory() -> dict[str, float]:
    """What the process holds now and held at most, GB (10^9 bytes). Linux."""
    status = Path("/proc/self/status").read_text().split("\n")
    kb = {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith(("VmRSS", "VmHWM"))}
    return {"rss_gb": kb["VmRSS"] * 1024 / 1e9, "peak_gb": kb["VmHWM"] * 1024 / 1e9}


def guard() -> None:
    """End this process before the machine runs out of memory."""
    while True:
        line = next(line for line in Path("/proc/meminfo").read_text().split("\n") if line.startswith("MemAvailable"))
        if int(line.split()[1]) * 1024 / 1e9 < LEFT:
            print(f"error: less than {LEFT} GB of memory is left: ended; go on with the same command", file=sys.stderr)
            os._exit(3)
        time.sleep(1)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# ---- three phases ----------------------------------------------------------------------------------------------------


def stored() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"experiment": "true_size"}


def save(result: dict[str, Any]) -> None:
    write_json(RESULT, plain("true_size", result))


def predict() -> None:
    """Run the narrow copies and write what they say of the true width. Raises ConfigError where that was measured already."""
    if "case" in stored():
        raise ConfigError(f"{RESULT}: holds a measurement already, which a prediction must precede; move it away first")
    narrow = []
    for width in NARROW:
        updates = UPDATES["case"] if width < 300 else MARKS[0]  # an hour in all
        narrow.append(
            run(size_config(width, updates=updates), CACHE / "true_size" / f"narrow_{width}", SAVE_EVERY["case"])
        )
    rho = {str(mark): shares_at(mark, narrow) for mark in MARKS}
    config = size_config()
    prediction = {
        "written": now(),
        "commit": provenance()["commit"],
        "norm_deviation": max(row["norm_deviation"] for one in narrow for row in one["updates"]),
        "shares": rho,
        "findings": [[f["rule"], f["severity"], f["step"]] for f in narrow[-1]["findings"]],
        "first_token_loss": expected_loss(config),
        "plan": planned(config),
        "peak_gb": gb(planned(config)) + beside(narrow),
        "plan_cure": planned(size_config(parameters="float32")),
        "matmul_tflops": (rate := matmul_rate()),
        "cpu_s": work(config) / rate,
    }
    save(stored() | {"narrow": narrow, "prediction": prediction})


def shares_at(mark: int, narrow: Sequence[dict[str, Any]]) -> dict[str, float]:
    """ρ of each kind after so many updates: a line in log2(width) through the narrow copies that got so far."""
    found = {one["d_model"]: row["shares"] for one in narrow for row in one["updates"] if row["step"] == mark}
    kinds = next(iter(found.values()))
    return {kind: line_at(WIDTH, [(width, table[kind]["rho"]) for width, table in found.items()]) for kind in kinds}


def gb(planned: dict[str, Any]) -> float:
    return sum(planned["bytes"].values()) / 1e9


def beside(narrow: Sequence[dict[str, Any]]) -> float:
    """What the narrow copies' processes held beside the plan at most, GB: Python, libraries, text."""
    return max(one["updates"][-1]["peak_gb"] - gb(one["plan"]) for one in narrow)


def work(config: Config) -> float:
    """TFLOP of an update under this watch: passes, one forward pass more where blocks are recomputed, Muon, its replays."""
    found = plan.flops(config)
    return (found.passes + found.optimizer) / 1e12


def matmul_rate(seconds: float = 3.0) -> float:
    """TFLOP/s of bf16 products as Muon makes them, of this process's threads, by CPU time of the best of several."""
    a, best = torch.randn(1, WIDTH, 4096).bfloat16(), 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.process_time()
        a @ a.mT
        best = max(best, 2 * WIDTH * WIDTH * 4096 / (time.process_time() - begun) / 1e12)
    return best


def measure(name: str, updates: int) -> None:
    """Raises ConfigError if there is no prediction."""
    if "prediction" not in stored():
        raise ConfigError(f"{RESULT}: no prediction yet; write it first: python -m benchmarks.true_size predict")
    config = size_config(parameters="float32" if name == "cure" else "bfloat16", updates=updates)
    save(stored() | {name: run(config, CACHE / "true_size" / name, SAVE_EVERY[name])})


def command(argv: Sequence[str] | None = None) -> None:
    """Raises ConfigError for wrong input. Ctrl-C: the last checkpoint stands, the same command goes on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.true_size", description=__doc__.split("\n\n")[0])
    parser.add_argument("phase", choices=["predict", *UPDATES])
    parser.add_argument("--updates", type=int, help="default: 20 of the case, 3 of the cure")
    parser.add_argument("--threads", type=int, default=1, help="of torch; default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.phase == "predict":
        predict()
    else:
        measure(args.phase, args.updates or UPDATES[args.phase])


if __name__ == "__main__":
    sys.exit(exit_code(command, sys.argv[1:]))
