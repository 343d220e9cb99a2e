"""What benchmarks/true_width committed: its prediction beside its measurement."""

from __future__ import annotations

import json
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.config import ConfigError
from moe_lab.failures.results import RESULTS


class TrueWidth(NamedTuple):
    """What benchmarks/true_width found, its prediction beside its measurement, each a list of rows."""

    shares: list[dict[str, Any]]  # of each block, std, kind and lr: realised share ρ over the same first updates
    nats: list[dict[str, Any]]  # of each block, mark and loss (training, validation): what bf16 costs
    widths: list[dict[str, Any]]  # of each block, std, d_model and lr: ρ of all of Muon's matrices together
    provenance: str


def load_true_width(path: Path = RESULTS / "true_width.json") -> TrueWidth:
    """The committed result. Raises ConfigError if it is missing or holds no measurement yet."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "measured" not in stored:
        command = "python -m benchmarks.true_width.true_width predict, then measure"
        raise ConfigError(f"{path}: no measurement yet; run: {command}")
    prediction, measured = stored["prediction"], stored["measured"]
    place = itemgetter("block", "std", "kind", "lr")
    rho: dict[tuple, float] = {}
    for row in measured["shares"]:
        rho.setdefault(place(row), row["rho"])  # the first is after the updates that were predicted, the last after all
    both = (row for row in prediction["shares"] if place(row) in rho)
    shares = [{**row, "predicted": row["rho"], "measured": rho[place(row)]} for row in both]
    nats = []
    for block, marks in measured["nats"].items():
        for mark, loss in product(marks, ("training", "validation")):
            predicted, found = (phase["nats"][block][mark][loss] for phase in (prediction, measured))
            nats.append({"block": block, "mark": int(mark), "loss": loss, "predicted": predicted, "measured": found})
    return TrueWidth(shares, nats, measured["widths"], how_made(stored))


def how_made(stored: dict[str, Any]) -> str:
    """One line: when, at which commits, for how long."""
    prediction, measured = stored["prediction"], stored["measured"]
    line = f"width {stored['width']}: predicted {prediction['written']} (commit {', '.join(prediction['commit'])}), "
    line += f"measured from {measured['begun']} (commit {', '.join(measured['commit'])}); 1 seed, "
    line += f"{(prediction['wall_s'] + measured['wall_s']) / 60:.0f} minutes of one thread"
    if experts := measured.get("experts"):
        line += f"; the experts' pair from {experts['begun']} (commit {', '.join(experts['commit'])}), "
        line += f"{experts['wall_s'] / 60:.0f} minutes of one thread more"
    return line
