"""What bf16 weights keep of their updates at the case's width, 1536: predicted from narrow models, then measured.

    python -m benchmarks.true_width.true_width predict     # widths 192, 384, 768 → the prediction, in notebooks/results
    python -m benchmarks.true_width.true_width measure     # width 1536; refuses to start without the prediction

One block in a one-layer language model (dense, or 8 experts top-2), real text, real gradients, the report's cure as LRs
(`designs.CURE`), constant after 20 updates of warm-up. The trajectory is float32, and a shadow computes what rounding to
bf16 would have kept of each update. A paired run with bf16 weights (same start values and batches) says what it costs.

Init std is part of the statement: `0.02` everywhere as in the case, or `fan_in`: 1/sqrt(fan_in) for every matrix except
the embedding, which has no fan-in and stays at 0.02.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.true_width.one_block import LRS, MARKS, OneBlock, has_fan_in, rows_of
from benchmarks.true_width.shadow import at_lr, by_part, part_of
from moe_lab.config import ConfigError
from moe_lab.data.prepare import CACHE
from moe_lab.failures.results import RESULTS, origins, write_json
from moe_lab.model import build_model
from moe_lab.optim.groups import group_of
from moe_lab.train.command import exit_code

Rows = Sequence[dict[str, Any]]

TRUE_WIDTH = 1536
BLOCKS = {"dense": ("0.02", "fan_in"), "moe": ("0.02",)}  # the init stds of each
PAIR = {"dense": MARKS[-1], "moe": 60}  # updates of a bf16 run: a stack of experts makes an update four times as dear
WINDOW = 20  # updates over which a training loss is averaged


# ---- the prediction --------------------------------------------------------------------------------------------------


def matching_factor(name: str, p: Tensor, std: str, ratio: float) -> float:
    """The factor on an LR in a model `ratio` times narrower with which an update is as large against its weight as at the
    true width. Muon moves an element by about lr / sqrt(fan_in), AdamW by about lr; std "fan_in" shrinks weights alike."""
    step = ratio**-0.5 if group_of(name) == "muon" else 1.0
    weight = ratio**0.5 if std == "fan_in" and has_fan_in(name, p) and part_of(name) != "gate" else 1.0
    return step * weight


def narrow_runs(width: int) -> list[OneBlock]:
    """The runs that predict `width`: an eighth, a fourth and half of it. Pairs with bf16 wherever they are cheap."""
    runs = []
    for block, stds in BLOCKS.items():
        for ratio in (8, 4, 2):
            lrs = tuple(sorted({float(f"{lr * f:.6g}") for lr in LRS for f in (1, ratio**0.5, ratio**-0.5)}))
            run = OneBlock(block=block, d_model=width // ratio, steps=MARKS[0], lrs=lrs)
            pair = replace(run, steps=PAIR[block])
            runs += [run] if (block, ratio) == ("moe", 2) else [pair, replace(pair, parameters="bfloat16")]
            runs += [replace(run, std="fan_in")] if "fan_in" in stds else []
    return runs


def true_runs(width: int) -> list[OneBlock]:
    """The runs at `width`, most wanted first."""
    dense, moe = (OneBlock(block=block, d_model=width, steps=MARKS[-1]) for block in BLOCKS)
    runs = [dense, replace(dense, parameters="bfloat16"), replace(dense, std="fan_in", steps=MARKS[0])]
    return [*runs, moe, replace(moe, parameters="bfloat16", steps=PAIR["moe"])]


def those(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of such runs."""
    return [row for row in rows if row["run"].items() >= wanted.items()]


def line_at(width: int, points: Sequence[tuple[int, float]]) -> float:
    """Least squares in log2(width), read off at `width`."""
    x, y = np.array(points, dtype=float).T
    return np.polyfit(np.log2(x / width), y, 1)[1].item()


def predicted_shares(width: int, block: str, std: str, rows: Rows) -> list[dict[str, Any]]:
    """A row for each kind and LR, over the first MARKS[0] updates. `rho` is the prediction: at each narrow width, ρ at the
    LR that `matching_factor` gives, and a line through the three."""
    table = []
    model = build_model(OneBlock(block=block, d_model=width).config().model)
    for lr in LRS:
        points: dict[str, list[tuple[int, float]]] = {}
        for row in those(rows, block=block, std=std, parameters="float32"):
            d = row["run"]["d_model"]
            factors = {name: matching_factor(name, p, std, width / d) for name, p in model.named_parameters()}
            for part, rho in by_part(at_lr(row["shadow"], lr, factors)).items():
                points.setdefault(part, []).append((d, rho))
        key = {"block": block, "std": std, "lr": lr}
        table += [key | {"kind": part, "rho": line_at(width, found)} for part, found in points.items()]
    return table


def nats(width: int, block: str, rows: Rows) -> dict[str, dict[str, float]]:
    """mark → what bf16 weights cost, in nats per token: `training` over the last WINDOW updates, `validation` at the mark.
    From the pair at this width."""
    pair = {row["run"]["parameters"]: row for row in those(rows, block=block, std="0.02", d_model=width)}
    if len(pair) < 2:
        return {}
    sick, sound = pair["bfloat16"], pair["float32"]
    table = {}
    for mark in (m for m in sick["validation"] if m in sound["validation"]):
        means = [sum(row["next_token"][int(mark) - WINDOW : int(mark)]) / WINDOW for row in (sick, sound)]
        difference = sick["validation"][mark] - sound["validation"][mark]
        table[mark] = {"training": means[0] - means[1], "validation": difference}
    return table


# ---- two phases ------------------------------------------------------------------------------------------------------


def result_path(width: int) -> Path:
    return RESULTS / "true_width.json" if width == TRUE_WIDTH else CACHE / "true_width" / f"result_{width}.json"


def stored_result(width: int) -> dict[str, Any]:
    """The result so far; empty before the prediction."""
    path = result_path(width)
    return json.loads(path.read_text()) if path.exists() else {}


def provenance(rows: Rows) -> dict[str, Any]:
    keys = ("block", "d_model", "std", "parameters")
    runs = [[*(row["run"][key] for key in keys), row["updates"]] for row in rows]
    times = {"begun": min(row["started"] for row in rows), "written": datetime.now(UTC).isoformat(timespec="seconds")}
    return times | origins(rows) | {"wall_s": round(sum(row["wall_s"] for row in rows)), "seeds": 1, "runs": runs}


def predict(width: int) -> None:
    """Run the narrow models and write the prediction. Raises ConfigError where the measurement is already there."""
    if "measured" in stored_result(width):
        held = "holds a measurement already, which a prediction must precede; move it away first"
        raise ConfigError(f"{result_path(width)}: {held}")
    rows = rows_of(narrow_runs(width))
    kinds = [(block, std) for block, stds in BLOCKS.items() for std in stds]
    shares = [row for block, std in kinds for row in predicted_shares(width, block, std, rows)]
    costs = {}
    for block, last in PAIR.items():
        widths = sorted({row["run"]["d_model"] for row in rows})
        by_width = {d: table for d in widths if (table := nats(d, block, rows))}
        costs[block] = {str(mark): {} for mark in MARKS if mark <= last}
        for mark, loss in product(costs[block], ("training", "validation")):
            costs[block][mark][loss] = line_at(width, [(d, table[mark][loss]) for d, table in by_width.items()])
    save(width, {"width": width, "prediction": provenance(rows) | {"nats": costs, "shares": shares}})


def measure(width: int) -> None:
    """Run the true width and write what it shows beside the prediction. After Ctrl-C it goes on with the runs that are left.

    Raises ConfigError if there is no prediction, or if a run is older than it.
    """
    stored = stored_result(width)
    if not stored:
        command = "python -m benchmarks.true_width.true_width predict"
        raise ConfigError(f"{result_path(width)}: no prediction yet; write it first: {command}")
    rows = rows_of(true_runs(width))
    facts, made = provenance(rows), stored["prediction"]["written"]
    if facts["begun"] < made:
        ages = f"the prediction ({made}) is younger than a run ({facts['begun']})"
        raise ConfigError(f"{result_path(width)}: {ages}; delete that run")
    shares, widths = [], []
    for row, lr in product([*rows_of(narrow_runs(width)), *rows], LRS):
        if row["shadow"]:
            key = {name: row["run"][name] for name in ("block", "std", "d_model")} | {"lr": lr}
            parts = by_part(at_lr(row["shadow"], lr))
            widths.append(key | {"rho": parts["Muon"]})
            if key["d_model"] == width:
                shares += [key | {"kind": part, "rho": rho} for part, rho in parts.items()]
    costs = {block: nats(width, block, rows) for block in BLOCKS}
    measured = facts | {"nats": costs, "widths": widths, "shares": shares}
    save(width, stored | {"measured": measured})


def save(width: int, result: dict[str, Any]) -> None:
    """Numbers to 5 digits."""
    short = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    write_json(result_path(width), {"experiment": "true_width", **short})


def command(argv: Sequence[str] | None = None) -> None:
    """Raises ConfigError for wrong input. Ctrl-C: finished runs are kept, the same command goes on."""
    name, phases = "python -m benchmarks.true_width.true_width", {"predict": predict, "measure": measure}
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n\n")[0])
    parser.add_argument("phase", choices=phases)
    parser.add_argument("--width", type=int, default=TRUE_WIDTH, help="a multiple of 192; default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.width <= 0 or args.width % 192:
        raise ConfigError(f"--width={args.width} must be a multiple of 192: an eighth of it has 12 heads of even width")
    phases[args.phase](args.width)


if __name__ == "__main__":
    sys.exit(exit_code(command, sys.argv[1:]))
