"""Factorial runs: a table of arms × seeds → a table of results with their spread.

Every cell is a real training run of the package's Trainer in a process of its own with one thread, so that a result does
not depend on how many cells run at once. All arms of one seed share start values and data order (both follow from
`training.seed`), so differences between arms are taken within a seed. A finished cell is kept in `.cache/experiments`
under a name made from what it was computed from; after an interruption, only the missing cells are run.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from moe_lab.config import ROOT, Config, ConfigError, from_dict, to_dict
from moe_lab.data.corpus import read_corpus
from moe_lab.data.prepare import CACHE
from moe_lab.optim.rounding import REMEDIES
from moe_lab.train import RunError, Trainer, read_record
from moe_lab.train.evaluate import evaluate
from moe_lab.train.loop import commit
from moe_lab.train.record import write_atomically

RESULTS = ROOT / "notebooks" / "results"
FORMAT = 1  # raise it whenever the same cell would give other numbers


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting of a factorial run. `remedy` is a key of `optim.rounding.REMEDIES`, for bf16 parameters."""

    config: Config
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table of runs: every arm with every seed, validation loss at each step of `evaluate_at` (the last one ends it)."""

    name: str
    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    evaluate_at: Sequence[int]

    def cells(self) -> list[dict[str, Any]]:
        """What each cell is computed from, as plain values, and under `key` a hash of it."""
        rows = []
        for seed in self.seeds:
            for name, arm in self.arms.items():
                config = arm.config.with_(training={"seed": seed, "steps": max(self.evaluate_at)})
                what = {"config": to_dict(config), "remedy": arm.remedy, "evaluate_at": sorted(self.evaluate_at)}
                key = hashlib.sha256(json.dumps([FORMAT, what], sort_keys=True).encode()).hexdigest()[:24]
                rows.append({"arm": name, "seed": seed, "key": key, "what": what})
        return rows


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; `sd` is NaN for a single one."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.n == 1 else f"{self.mean:.3f} ± {self.sd:.3f}"


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    sd = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return Spread(sum(values) / len(values), sd, len(values))


class Results:
    """Rows of an experiment: one finished cell each, with what it measured and where it comes from."""

    def __init__(self, name: str, rows: Sequence[dict[str, Any]]):
        self.name, self.rows = name, list(rows)

    def loss(self, arm: str, seed: int, step: int | None = None) -> float:
        """Validation loss of one cell, nats per token; infinite if the run diverged. `step`: the last one by default."""
        row = next(row for row in self.rows if row["arm"] == arm and row["seed"] == seed)
        value = row["validation"].get(str(step or row["steps"]))
        return math.inf if value is None else value

    def losses(self, arm: str, step: int | None = None) -> Spread:
        return spread(self.loss(arm, seed, step) for seed in self.seeds(arm))

    def paired(self, arm: str, other: str, step: int | None = None) -> Spread:
        """Loss of `arm` minus that of `other`, seed by seed: what both share cancels."""
        seeds = [seed for seed in self.seeds(arm) if seed in self.seeds(other)]
        return spread(self.loss(arm, seed, step) - self.loss(other, seed, step) for seed in seeds)

    def seeds(self, arm: str) -> list[int]:
        return [row["seed"] for row in self.rows if row["arm"] == arm]

    def arms(self) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.rows))

    def provenance(self) -> str:
        """One line: how many runs, which commits, corpus, torch, seconds of one core."""
        kinds = {key: sorted({str(row[key]) for row in self.rows}) for key in ("commit", "corpus", "torch", "machine")}
        seconds = sum(row["wall_s"] for row in self.rows)
        corpora = ", ".join(corpus[:12] for corpus in kinds["corpus"])
        return (
            f"{self.name}: {len(self.rows)} runs, commit {', '.join(kinds['commit'])}, corpus {corpora}, "
            f"torch {', '.join(kinds['torch'])}, {', '.join(kinds['machine'])}, {seconds / 60:.0f} minutes of one core"
        )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        write_atomically(path, f'{{"experiment": {json.dumps(self.name)}, "rows": [\n{lines}\n]}}\n')


def load_results(name: str) -> Results:
    """Committed results. Raises ConfigError if there are none under that name."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise ConfigError(f"{path}: no committed results of that name; run the experiment with redo=True")
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Results(stored["experiment"], stored["rows"])


def collect(experiment: Experiment, redo: bool = False, workers: int | None = None, progress: bool = True) -> Results:
    """Results of every cell: the committed ones where they are of exactly these settings, else freshly computed.

    `redo` computes all of them, unless this machine's cache has them. The first Ctrl-C raises KeyboardInterrupt after
    the running cells are stopped; finished ones stay in the cache.
    """
    cells = experiment.cells()
    stored = {}
    if not redo and (RESULTS / f"{experiment.name}.json").exists():
        stored = {row["key"]: row for row in load_results(experiment.name).rows}
    missing = [cell for cell in cells if cell["key"] not in stored]
    computed = compute(missing, workers, progress, experiment.name) if missing else {}
    return Results(
        experiment.name,
        [{**(stored | computed)[c["key"]], "arm": c["arm"], "seed": c["seed"], "key": c["key"]} for c in cells],
    )


def compute(cells: list[dict], workers: int | None, progress: bool, name: str) -> dict[str, dict]:
    """Run the cells that the cache does not hold; key → row."""
    unique = {cell["key"]: cell for cell in cells}
    corpora = {json.dumps(cell["what"]["config"]["data"]): cell["what"]["config"] for cell in cells}
    hashes = {data: read_corpus(from_dict(config).data, progress).hash for data, config in corpora.items()}
    paths = {
        key: CACHE / "experiments" / f"{key}_{hashes[json.dumps(cell['what']['config']['data'])][:12]}.json"
        for key, cell in unique.items()
    }
    todo = [key for key in unique if not paths[key].exists()]
    with tqdm(total=len(unique), initial=len(unique) - len(todo), unit="run", desc=name, disable=not progress) as bar:
        n_workers = min(workers or os.cpu_count() or 1, max(1, len(todo)))
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(n_workers, context, initializer=start_worker)
        try:
            futures = {pool.submit(run_cell, unique[key]["what"]): key for key in todo}
            for future in as_completed(futures):
                path = paths[futures[future]]
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(future.result()))
                bar.update()
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return {key: json.loads(path.read_text()) for key, path in paths.items()}


def start_worker() -> None:
    """One thread; and no life after the parent's, which may be killed without a word."""
    torch.set_num_threads(1)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def run_cell(what: dict[str, Any]) -> dict[str, Any]:
    """Train one cell and measure it. A run that diverges is a result too: its later losses are null."""
    config = from_dict(what["config"])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, what["remedy"], folder)
        trainer.start()
        trainer.model.train()
        validation: dict[str, float | None] = {}
        diverged = None
        try:
            for step in what["evaluate_at"]:
                while trainer.step < step:
                    trainer.update()
                trainer.flush()
                validation[str(step)] = validate(trainer)
        except RunError:
            diverged = trainer.step
        validation |= {str(step): None for step in what["evaluate_at"] if str(step) not in validation}
        rows = [row for row in read_record(folder) if "loss" in row]
        weights = config.model.aux_loss_weights
        next_token = [row["losses"]["next_token"] * sum(weights) / weights[0] for row in rows]
        return {
            "steps": config.n_steps,
            "tokens": trainer.tokens(),
            "validation": validation,
            "diverged_at": diverged,
            "training": {str(rows[i]["step"]): finite(round(next_token[i], 5)) for i in range(0, len(rows), 10)},
            "norm_deviation": finite(trainer.readings.norm_deviation().item()),
            "median_grad_norm": finite(statistics.median(row["grad_norm"] for row in rows)),
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "wall_s": round(time.perf_counter() - start, 1),
            "commit": commit(),
            "corpus": trainer.dataset.corpus_hash,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }


def make_trainer(config: Config, remedy: str | None, folder: str | Path) -> Trainer:
    """A Trainer for one cell, its optimizers wrapped by a remedy for bf16 parameters where the arm has one."""
    if remedy is None:
        return Trainer(config, folder)
    model = Trainer(config.with_(precision={"parameters": "float32"}), folder).model  # the start values before the cast
    optimizers = REMEDIES[remedy](model, config.optimizer, config.training.max_lr)
    return Trainer(config, folder, model=model, optimizers=optimizers)


def validate(trainer: Trainer) -> float | None:
    """Validation loss now; None where it is not finite."""
    config = trainer.config
    loss = evaluate(trainer.model, trainer.dataset.validation, config.model.max_seq_len, 16, trainer.autocast)
    return finite(loss["validation_loss"])


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
