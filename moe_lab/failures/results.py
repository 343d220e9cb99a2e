"""What runs measured: tables of rows with their spread over seeds, where numbers come from, and committed results."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_lab.config import ROOT, ConfigError
from moe_lab.train.record import commit, write_atomically

RESULTS = ROOT / "notebooks" / "results"


def provenance() -> dict[str, str | None]:
    """What computes here; it stands beside every number that is kept."""
    python, machine = platform.python_version(), platform.machine()
    return {"commit": commit(), "python": python, "torch": torch.__version__, "machine": machine}


def origins(rows: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """All that rows say about where they come from."""
    return {key: sorted({str(row[key]) for row in rows}) for key in ("commit", "corpus", "torch", "machine")}


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
        """One line: how many runs, which commits, corpus, torch, minutes of one core."""
        found = {key: ", ".join(value[:12] for value in values) for key, values in origins(self.rows).items()}
        made = f"commit {found['commit']}, corpus {found['corpus']}, torch {found['torch']}, {found['machine']}"
        minutes = sum(row["wall_s"] for row in self.rows) / 60
        return f"{self.name}: {len(self.rows)} runs, {made}, {minutes:.0f} minutes of one core"

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


class TrueWidth(NamedTuple):
    """What benchmarks/true_width found. `shares`: a row for each block, std, kind and lr: `predicted` (`low`, `high`,
    `same_lr`, `fresh`) and `measured` (`error`, `lost`) realised share ρ over the same first updates, `measured_last` after
    `updates`. `nats`: a row for each block, mark and loss (training, validation): `predicted`, `measured`. `displacement`:
    block → `updates` and, by kind, ρ of the bf16 run over all of them. `widths`: ρ of all of Muon's matrices together over
    the first updates, for each block, std, d_model and lr."""

    shares: list[dict[str, Any]]
    nats: list[dict[str, Any]]
    displacement: dict[str, dict[str, Any]]
    widths: list[dict[str, Any]]
    provenance: str


def load_true_width(path: Path = RESULTS / "true_width.json") -> TrueWidth:
    """The committed result. Raises ConfigError if it is missing or holds no measurement yet."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "measured" not in stored:
        command = "python -m benchmarks.true_width.true_width predict, then measure"
        raise ConfigError(f"{path}: no measurement yet; run: {command}")
    prediction, measured = stored["prediction"], stored["measured"]
    shares, costs = [], []
    for row in prediction["shares"]:
        same = [m for m in measured["shares"] if all(m[key] == row[key] for key in ("block", "std", "kind", "lr"))]
        if same:  # after the updates that were predicted, and after all
            found = {"measured": same[0]["rho"], "error": same[0]["error"], "lost": same[0]["lost"]}
            found |= {"measured_last": same[-1]["rho"], "updates": same[-1]["updates"]}
            shares.append({**row, "predicted": row["rho"], **found})
    for block, mark in ((block, mark) for block, table in measured["nats"].items() for mark in table):
        predicted, found = (phase["nats"][block][mark] for phase in (prediction, measured))
        for loss in ("training", "validation"):
            row = {"block": block, "mark": int(mark), "loss": loss}
            costs.append(row | {"predicted": predicted[loss], "measured": found[loss]})
    line = (
        f"width {stored['width']}: predicted {prediction['written']} (commit {', '.join(prediction['commit'])}), measured from "
        f"{measured['begun']} (commit {', '.join(measured['commit'])}); 1 seed, "
        f"{(prediction['wall_s'] + measured['wall_s']) / 60:.0f} minutes of one thread"
    )
    if experts := measured.get("experts"):
        line += f"; the experts' pair from {experts['begun']} (commit {', '.join(experts['commit'])}), "
        line += f"{experts['wall_s'] / 60:.0f} minutes of one thread more"
    return TrueWidth(shares, costs, measured["displacement"], measured["widths"], line)
