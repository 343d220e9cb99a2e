"""What `make true-size` left of the case's own model at its own size, complete or not."""

from __future__ import annotations

import json
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


def arrived(narrow: list[dict[str, Any]], mark: int) -> dict[str, dict[int, float]]:
    """Kind of tensor → width → share of the intended displacement that arrived after `mark` updates."""
    rows = {run["d_model"]: next(row for row in run["updates"] if row["step"] == mark) for run in narrow}
    return {name: {w: row["shares"][kind]["rho"] for w, row in rows.items()} for name, kind in KINDS.items()}
