"""The run engine: a table of settings → a row of measurements each, kept by content.

A cell is a real training, usually in a process of its own with one thread, so that a result does not depend on how many
run at once. Finished rows are kept in `.cache/runs`. All arms of one seed share start values and data order (both follow
from `training.seed`), so differences between arms are taken within a seed.
"""

import hashlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moe_lab.config import GONE, Config, to_dict
from moe_lab.data.corpus import read_corpus
from moe_lab.data.prepare import CACHE
from moe_lab.failures.bugs import planted
from moe_lab.failures.results import RESULTS, Results, load_results, provenance
from moe_lab.optim.rounding import Remedy
from moe_lab.train import RunError, Trainer, read_record
from moe_lab.train.evaluate import evaluate
from moe_lab.train.record import write_atomically

SEEDS = (0, 1, 2)
FORMAT = 1  # raise it whenever the same cell would give other numbers
# fields that came later, at the value that changes nothing: runs of before keep their keys
LATER = {("model", "zero_init_output"): False, ("training", "compile"): False}


@dataclass(frozen=True)
class Arm:
    """One setting. `remedy`: for bf16 parameters, a name and a function such as those of `optim.rounding.REMEDIES`.
    `bugs`: ids of what is planted (`bugs.planted`) while the run is built and driven."""

    config: Config
    remedy: tuple[str, Remedy] | None = None
    bugs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cell(Arm):
    """One run. `probe(trainer, **options)`, a function of a module, drives the trainer by `trainer.steps(until)` and
    returns the row; `options` are plain values."""

    probe: Callable[..., dict[str, Any]]
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A hash of what the row is computed from."""
        config = to_dict(self.config)
        config["model"] |= GONE  # all runs had these values
        for (section, name), before in LATER.items():
            if config[section][name] == before:
                del config[section][name]
        what = {"config": config, "remedy": self.remedy and self.remedy[0], **self.options}
        what |= {"bugs": self.bugs} if self.bugs else {}
        return hashlib.sha256(json.dumps([FORMAT, what], sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table of runs: every arm with every seed, validation loss at each step of `evaluate_at` (the last one ends it)."""

    name: str
    arms: Mapping[str, Arm]
    seeds: Sequence[int] = SEEDS
    evaluate_at: Sequence[int] = (200,)

    def cells(self) -> dict[tuple[str, int], Cell]:
        """The cell of each arm and seed."""
        options = {"evaluate_at": sorted(self.evaluate_at)}
        steps = max(self.evaluate_at)
        cells = {}
        for seed, (name, arm) in product(self.seeds, self.arms.items()):
            config = arm.config.with_(training={"seed": seed, "steps": steps})
            cells[name, seed] = Cell(**vars(arm) | {"config": config}, probe=losses_at, options=options)
        return cells


def collect(experiment: Experiment, redo: bool = False, workers: int | None = None, progress: bool = True) -> Results:
    """Results of every cell: the committed ones where they are of exactly these settings, else computed by `run_cells`.
    `redo` computes all of them, unless this machine's cache has them."""
    cells, rows = experiment.cells(), {}
    if not redo and (RESULTS / f"{experiment.name}.json").exists():
        rows = {row["key"]: row for row in load_results(experiment.name).rows}
    missing = [cell for cell in cells.values() if cell.key not in rows]
    rows |= run_cells(missing, workers, progress, experiment.name) if missing else {}
    table = [{**rows[cell.key], "arm": arm, "seed": seed, "key": cell.key} for (arm, seed), cell in cells.items()]
    return Results(experiment.name, table)


def run_cells(
    cells: Sequence[Cell], workers: int | None = None, progress: bool = True, name: str = "runs"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, row) of each cell: those of the cache first, then the others as they are finished, `workers` at a time
    (None: as many as there are cores), each in a process of its own; 0: here, one after another. An error in a cell, or
    Ctrl-C, ends the running ones and is raised; what is finished stays in the cache."""
    hashes = {data: read_corpus(data, progress=False).hash for data in {cell.config.data for cell in cells}}
    paths = {cell.key: CACHE / "runs" / f"{cell.key}_{hashes[cell.config.data][:12]}.json" for cell in cells}
    jobs = {cell.key: (cell, paths[cell.key]) for cell in cells if not paths[cell.key].exists()}.values()
    done = in_processes(run_cell, jobs, workers) if jobs and workers != 0 else (run_cell(*job) for job in jobs)
    there = [path for path in paths.values() if path.exists()]
    for path in tqdm(chain(there, done), name, len(paths), unit="run", disable=not progress):
        yield path.name.split("_")[0], json.loads(path.read_text())


def in_processes(work: Callable[..., Any], jobs: Collection[tuple], workers: int | None) -> Iterator[Any]:
    """What `work(*job)` returns of each, as they are finished. An error, or an end of the iteration, ends all processes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    n_workers = min(workers or os.cpu_count() or 1, len(jobs))
    with theirs, ours, ProcessPoolExecutor(n_workers, context, start_worker, (theirs,)) as pool:
        try:
            futures = [pool.submit(work, *job) for job in jobs]
            yield from (future.result() for future in as_completed(futures))
        except BaseException:
            ours.close()  # ends the workers
            raise


def start_worker(parent: Connection) -> None:
    """No life after the parent closes its end, as it also does when it is killed without a word."""
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


def run_cell(cell: Cell, path: Path) -> Path:
    """Train one cell, and write what its probe measured to `path`, which is returned."""
    start, began = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, planted(*cell.bugs):
        trainer = make_trainer(cell.config, cell.remedy and cell.remedy[1], folder)
        made = provenance() | {"corpus": trainer.dataset.corpus_hash, "started": began}
        row = cell.probe(trainer, **cell.options)
    wall = {"wall_s": round(time.perf_counter() - start, 1), "updates": trainer.step}
    write_atomically(path, json.dumps(row | made | wall))
    return path


def make_trainer(config: Config, remedy: Remedy | None, folder: str | Path) -> Trainer:
    """A Trainer for one cell, its optimizers wrapped by a remedy for bf16 parameters where the arm has one."""
    if remedy is None:
        return Trainer(config, folder)
    model = Trainer(config.with_(precision={"parameters": "float32"}), folder).model  # the start values before the cast
    optimizers = remedy(model, config.optimizer, config.training.max_lr)
    return Trainer(config, folder, model=model, optimizers=optimizers)


def losses_at(trainer: Trainer, evaluate_at: Sequence[int]) -> dict[str, Any]:
    """Validation losses after these updates, and how the run went. A run that diverges is a result too: its later losses
    are null, as JSON has no NaN."""
    validation, diverged = dict.fromkeys(map(str, evaluate_at)), None
    try:
        for step in evaluate_at:
            for _ in trainer.steps(step):
                pass
            validation[str(step)] = finite(validation_loss(trainer))
    except RunError:
        diverged = trainer.step
    rows = [row for row in read_record(trainer.run_dir) if "loss" in row]
    weights = trainer.config.model.aux_loss_weights
    tenths = {str(row["step"]): row["losses"]["next_token"] * sum(weights) / weights[0] for row in rows[::10]}
    return {
        "steps": trainer.n_steps,
        "tokens": trainer.tokens(),
        "validation": validation,
        "diverged_at": diverged,
        "training": {step: finite(round(loss, 5)) for step, loss in tenths.items()},
        "norm_deviation": finite(trainer.readings.norm_deviation().item()),
        "median_grad_norm": finite(statistics.median(row["grad_norm"] for row in rows)),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def validation_loss(trainer: Trainer, n_tokens: int | None = None) -> float:
    """Now, over the first `n_tokens` of the split, or all of it."""
    tokens = trainer.dataset.validation[: n_tokens and n_tokens + 1]
    return evaluate(trainer.model, tokens, 16, trainer.autocast)["validation_loss"]


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
