"""Readers of committed results that are no table of runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.config import ConfigError
from moe_lab.failures.experiments import RESULTS

MARKS = (40, 60, 80, 100, 120, 150)  # updates after which the runs at the case's width are read


class TrueWidth(NamedTuple):
    """`shares`: a row for each block, std, kind and lr: `predicted` (`low`, `high`, `same_lr`, `fresh`) and `measured`
    (`error`, `lost`) realised share ρ over the same first updates, `measured_last` after `updates`. `nats`: a row for each
    block, mark and loss (training, validation): `predicted`, `measured`. `displacement`: block → `updates` and, by
    kind, ρ of the bf16 run over all of them (`shadow.Displacement`). `widths`: ρ of all of Muon's matrices together over the
    first updates, for each block, std, d_model and lr."""

    shares: list[dict[str, Any]]
    nats: list[dict[str, Any]]
    displacement: dict[str, dict[str, Any]]
    widths: list[dict[str, Any]]
    provenance: str


def load_true_width(path: Path = RESULTS / "true_width.json") -> TrueWidth:
    """The committed result. Raises ConfigError if it is missing or holds no measurement yet."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "measured" not in stored:
        raise ConfigError(
            f"{path}: no measurement yet; run: python -m benchmarks.true_width.true_width predict, then measure"
        )
    prediction, measured = stored["prediction"], stored["measured"]
    shares = []
    for row in prediction["shares"]:
        same = [m for m in measured["shares"] if all(m[key] == row[key] for key in ("block", "std", "kind", "lr"))]
        early = next((m for m in same if m["updates"] == MARKS[0]), None)
        if early:
            last = max(same, key=lambda m: m["updates"])
            found = {"measured": early["rho"], "error": early["error"], "lost": early["lost"]}
            found |= {"measured_last": last["rho"], "updates": last["updates"]}
            shares.append({**row, "predicted": row["rho"], **found})
    costs = []
    for block, table in measured["nats"].items():
        for mark, values in table.items():
            foretold = prediction["nats"][block][mark]
            costs += [
                {"block": block, "mark": int(mark), "loss": loss, "predicted": foretold[loss], "measured": values[loss]}
                for loss in ("training", "validation")
            ]
    line = (
        f"width {stored['width']}: predicted {prediction['written']} (commit {', '.join(prediction['commit'])}), measured from "
        f"{measured['begun']} (commit {', '.join(measured['commit'])}); 1 seed, "
        f"{(prediction['wall_s'] + measured['wall_s']) / 60:.0f} minutes of one thread"
    )
    if "experts" in measured:
        pair = measured["experts"]
        line += (
            f"; the experts' pair from {pair['begun']} (commit {', '.join(pair['commit'])}), {pair['wall_s'] / 60:.0f} minutes "
            "of one thread more"
        )
    return TrueWidth(shares, costs, measured["displacement"], measured["widths"], line)
