"""What `make true-size` left of the case's own model at its own size, complete or not."""

from __future__ import annotations

import json
from statistics import fmean
from typing import Any

from moe_lab.failures.results import RESULTS

HEADS = ("next_token", "future_2", "future_3", "future_4")
KINDS = {
    "norms": "layers.*.ffn_norm.weight",
    "queries": "layers.*.seq_layer.q_proj.weight",
    "down_proj": "layers.*.ffn.down_proj.weight",
    "experts": "layers.*.ffn.up_proj",
    "heads": "lm_heads.*.weight",
}


def load_true_size() -> dict[str, Any]:
    """`prediction` and what of it was `corrected` before the run, the `narrow` copies, the `case`, and the `cure` once it ran."""
    return json.loads((RESULTS / "true_size.json").read_text(encoding="utf-8"))


def token_losses(run: dict[str, Any]) -> list[float]:
    """Of each update, the loss of the four heads, nats per token: what is expected to begin at ln V + var/2."""
    return [sum(row["losses"][head] for head in HEADS) for row in run["updates"]]


def shares_at(run: dict[str, Any], mark: int) -> dict[str, float]:
    """Kind of tensor → share of the intended displacement that arrived after `mark` updates."""
    row = next(row for row in run["updates"] if row["step"] == mark)
    return {kind: share["rho"] for kind, share in row["shares"].items()}


def arrived(runs: list[dict[str, Any]], mark: int) -> dict[str, dict[int, float]]:
    """The same of `KINDS`, by name and width, for the runs that got so far."""
    reached = [run for run in runs if run["updates"][-1]["step"] >= mark]
    return {name: {run["d_model"]: shares_at(run, mark)[kind] for run in reached} for name, kind in KINDS.items()}


def foretold(prediction: dict[str, Any], mark: int) -> dict[str, float]:
    """What was predicted for the true width, of `KINDS`."""
    return {name: prediction["shares"][str(mark)][kind] for name, kind in KINDS.items()}


def misses(size: dict[str, Any], mark: int) -> tuple[float, float]:
    """How far the true width's shares lie from the line over the copies, and from the copies' mean: over all kinds of tensor,
    the mean of the absolute differences."""
    true, line = shares_at(size["case"], mark), size["prediction"]["shares"][str(mark)]
    copies = [shares_at(run, mark) for run in size["narrow"] if run["updates"][-1]["step"] >= mark]
    mean = {kind: fmean(copy[kind] for copy in copies) for kind in true}
    return tuple(fmean(abs(true[kind] - guess[kind]) for kind in true) for guess in (line, mean))
