"""What bf16 weights keep of their updates at the case's width, 1536: predicted from narrow models, then measured.

    python -m benchmarks.true_width.true_width predict     # widths 192, 384, 768 → the prediction, in notebooks/results
    python -m benchmarks.true_width.true_width measure     # width 1536; refuses to start without the prediction
    python -m benchmarks.true_width.true_width experts     # of that, only what bf16 costs the block with experts; into the same file

One block in a one-layer language model (dense, or 8 experts top-2), real text, real gradients, the report's cure as LRs
(`designs.CURE`), constant after 20 updates of warm-up. The trajectory is float32; at each update and for several LRs, a
shadow computes what rounding to bf16 would have kept of it. The shadow carries nothing over to the next update: it says
what one update keeps. A paired run with bf16 weights (same start values and batches) says what it adds up to.

Init std is part of the statement: `0.02` everywhere as in the case, or `fan_in`: 1/sqrt(fan_in) for every matrix except
the embedding, which has no fan-in and stays at 0.02.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.true_width.one_block import LRS, Cell, cached, compute, has_fan_in, start_values
from benchmarks.true_width.shadow import at_lr, by_kind, kind_of
from moe_lab.config import ConfigError
from moe_lab.data.prepare import CACHE
from moe_lab.failures.experiments import RESULTS
from moe_lab.failures.results import MARKS
from moe_lab.health.measures import predict_lost
from moe_lab.optim.groups import group_of
from moe_lab.train.record import write_atomically

TRUE_WIDTH = 1536
BLOCKS = {"dense": ("0.02", "fan_in"), "moe": ("0.02",)}  # the init stds of each
PAIR = {"dense": MARKS[-1], "moe": 60}  # updates of a bf16 run: a stack of experts makes an update four times as dear
WINDOW = 20  # updates over which a training loss is averaged


# ---- the prediction --------------------------------------------------------------------------------------------------


def matching_factor(name: str, p: Tensor, std: str, ratio: float) -> float:
    """The factor on an LR in a model `ratio` times narrower with which an update is as large against its weight as at the
    true width. Muon moves an element by about lr / sqrt(fan_in), AdamW by about lr; std "fan_in" shrinks weights alike."""
    step = ratio**-0.5 if group_of(name) == "muon" else 1.0
    weight = ratio**0.5 if std == "fan_in" and has_fan_in(name, p) and kind_of(name) != "gate" else 1.0
    return step * weight


def narrow_cells(width: int) -> list[Cell]:
    """The runs that predict `width`: an eighth, a fourth and half of it. Pairs with bf16 wherever they are cheap."""
    cells = []
    for block, stds in BLOCKS.items():
        for ratio in (8, 4, 2):
            lrs = tuple(sorted({float(f"{lr * f:.6g}") for lr in LRS for f in (1, ratio**0.5, ratio**-0.5)}))
            cell = Cell(block=block, d_model=width // ratio, steps=MARKS[0], lrs=lrs)
            pair = replace(cell, steps=PAIR[block])
            cells += [cell] if (block, ratio) == ("moe", 2) else [pair, replace(pair, parameters="bfloat16")]
            cells += [replace(cell, std="fan_in")] if "fan_in" in stds else []
    return cells


def true_cells(width: int) -> list[Cell]:
    """The runs at `width`, most wanted first."""
    dense, moe = (Cell(block=block, d_model=width, steps=MARKS[-1]) for block in BLOCKS)
    cells = [dense, replace(dense, parameters="bfloat16"), replace(dense, std="fan_in", steps=MARKS[0])]
    return [*cells, moe, replace(moe, parameters="bfloat16", steps=PAIR["moe"])]


def experts_pair(width: int) -> list[Cell]:
    """The block with experts, float32 and bf16, as far as the bf16 run goes."""
    sound = Cell(block="moe", d_model=width, steps=PAIR["moe"])
    return [sound, replace(sound, parameters="bfloat16")]


def line_at(width: int, points: Sequence[tuple[int, float]]) -> float:
    """Least squares in log2(width), read off at `width`."""
    x, y = torch.tensor([(math.log2(w), value) for w, value in points], dtype=torch.float64).T
    x = x - math.log2(width)
    slope = ((x - x.mean()) @ (y - y.mean()) / ((x - x.mean()) @ (x - x.mean()))).item()
    return y.mean().item() - slope * x.mean().item()


def fresh_share(model: nn.Module, lr: float) -> dict[str, float]:
    """ρ of each kind of Muon's matrices without any training: `predict_lost` on start values, elements of lr / sqrt(fan_in)."""
    matrices = {kind_of(n): p.flatten()[:1_000_000] for n, p in model.named_parameters() if group_of(n) == "muon"}
    fan_in = {kind_of(n): p.shape[-1] for n, p in model.named_parameters()}
    return {kind: predict_lost(p, lr * fan_in[kind] ** -0.5).realised for kind, p in matrices.items()}


def predicted_shares(width: int, block: str, std: str) -> list[dict[str, Any]]:
    """A row for each kind and LR, over the first MARKS[0] updates. `rho` is the prediction: at each narrow width, ρ at the
    LR that `matching_factor` gives, and a line through the three; `low` and `high` are their extremes. For comparison
    `same_lr` (a line through ρ at the same LR) and `fresh` (no run at all)."""
    rows = [cached(c) for c in narrow_cells(width) if (c.block, c.std, c.parameters) == (block, std, "float32")]
    mark, table = str(MARKS[0]), []
    model = start_values(Cell(block=block, d_model=width).config().model, std)
    for lr in LRS:
        matched, same = {}, {}
        for row in rows:
            d = row["cell"]["d_model"]
            factors = {n: matching_factor(n, p, std, width / d) for n, p in model.named_parameters()}
            for kind, values in by_kind(at_lr(row["shadow"][mark], lr, factors)).items():
                matched.setdefault(kind, []).append((d, values["rho"]))
            for kind, values in by_kind(at_lr(row["shadow"][mark], lr)).items():
                same.setdefault(kind, []).append((d, values["rho"]))
        fresh = fresh_share(model, lr)
        for kind, points in matched.items():
            rho, ends = line_at(width, points), [value for _, value in points]
            row = {"block": block, "std": std, "kind": kind, "lr": lr, "rho": rho, "low": min(rho, *ends)}
            row |= {"high": max(rho, *ends), "same_lr": line_at(width, same[kind]), "fresh": fresh.get(kind)}
            table.append(row)
    return table


def nats(width: int, block: str, cells: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """mark → what bf16 weights cost, in nats per token: `training` over the last WINDOW updates, `validation` at the mark.
    From the pair among `cells` at this width."""
    pair = [cached(c) for c in cells if (c.block, c.std, c.d_model) == (block, "0.02", width)]
    runs = {row["cell"]["parameters"]: row for row in pair if row}
    if len(runs) < 2:
        return {}
    sick, sound = runs["bfloat16"], runs["float32"]
    table = {}
    for mark in (m for m in sick["validation"] if m in sound["validation"]):
        means = [sum(row["next_token"][int(mark) - WINDOW : int(mark)]) / WINDOW for row in (sick, sound)]
        difference = sick["validation"][mark] - sound["validation"][mark]
        table[mark] = {"training": means[0] - means[1], "validation": difference, "float32": sound["validation"][mark]}
    return table


# ---- two phases ------------------------------------------------------------------------------------------------------


def result_path(width: int) -> Path:
    return RESULTS / "true_width.json" if width == TRUE_WIDTH else CACHE / "true_width" / f"result_{width}.json"


def provenance(cells: Sequence[Cell]) -> dict[str, Any]:
    rows = [row for row in map(cached, cells) if row]
    kinds = {key: sorted({str(row[key]) for row in rows}) for key in ("commit", "corpus", "torch", "machine")}
    runs = [
        [c["block"], c["d_model"], c["std"], c["parameters"], row["updates"]] for row in rows for c in [row["cell"]]
    ]
    times = {"begun": min(row["started"] for row in rows), "written": datetime.now(UTC).isoformat(timespec="seconds")}
    return times | kinds | {"wall_s": round(sum(row["wall_s"] for row in rows)), "seeds": 1, "runs": runs}


def predict(width: int) -> None:
    """Run the narrow models and write the prediction. Raises ConfigError where the measurement is already there."""
    path, cells = result_path(width), narrow_cells(width)
    if path.exists() and "measured" in json.loads(path.read_text()):
        raise ConfigError(f"{path}: holds a measurement already, which a prediction must precede; move it away first")
    compute(cells)
    shares = [row for block, stds in BLOCKS.items() for std in stds for row in predicted_shares(width, block, std)]
    costs, narrow = {}, {}
    for block in BLOCKS:
        by_width = {d: table for d in sorted({c.d_model for c in cells}) if (table := nats(d, block, cells))}
        narrow[block] = by_width
        costs[block] = {
            mark: {
                loss: line_at(width, [(d, table[mark][loss]) for d, table in by_width.items()])
                for loss in ("training", "validation")
            }
            for mark in map(str, MARKS)
            if int(mark) <= PAIR[block]
        }
    save(path, {"width": width, "prediction": provenance(cells) | {"nats": costs, "narrow": narrow, "shares": shares}})


def measure(width: int) -> None:
    """Run the true width and write what it shows beside the prediction, anew after every run, and after Ctrl-C.

    Raises ConfigError if there is no prediction, or if a run is older than it.
    """
    if not result_path(width).exists():
        command = "python -m benchmarks.true_width.true_width predict"
        raise ConfigError(f"{result_path(width)}: no prediction yet; write it first: {command}")
    try:
        compute(true_cells(width), after=lambda: write_measured(width))
    finally:
        write_measured(width)


def write_measured(width: int) -> None:
    """Put what the runs at `width` have shown so far into the result; an unfinished run counts with the updates it has."""
    path, cells = result_path(width), true_cells(width)
    stored, rows = json.loads(path.read_text()), [row for row in map(cached, cells) if row]
    if not rows:
        return
    facts, made = provenance(cells), stored["prediction"]["written"]
    if facts["begun"] < made:
        raise ConfigError(f"{path}: the prediction ({made}) is younger than a run ({facts['begun']}); delete that run")
    shares, displacement = [], {}
    for row in rows:
        cell, marks = row["cell"], sorted(row["shadow"], key=int)
        if row["displacement"]:
            displacement[cell["block"]] = {"updates": row["updates"], "kinds": by_kind(row["displacement"])}
        for mark in dict.fromkeys([*marks[:1], *marks[-1:]]):
            for lr in LRS:
                for kind, values in by_kind(at_lr(row["shadow"][mark], lr)).items():
                    key = {"block": cell["block"], "std": cell["std"], "kind": kind, "lr": lr, "updates": int(mark)}
                    shares.append(key | values)
    widths = [
        {"block": c["block"], "std": c["std"], "d_model": c["d_model"], "lr": lr}
        | by_kind(at_lr(row["shadow"][str(MARKS[0])], lr))["Muon"]
        for row in [*map(cached, narrow_cells(width)), *rows]
        if row and str(MARKS[0]) in row["shadow"]
        for c in [row["cell"]]
        for lr in LRS
    ]
    costs = {block: nats(width, block, cells) for block in BLOCKS}
    measured = facts | {"nats": costs, "displacement": displacement, "widths": widths, "shares": shares}
    save(path, stored | {"measured": measured})


def measure_experts(width: int) -> None:
    """Run the pair with experts alone, as a machine does that has none of the other runs, and put what it shows into the
    result, with a provenance of its own. Raises ConfigError if there is no measurement to add it to."""
    path, cells = result_path(width), experts_pair(width)
    stored = json.loads(path.read_text()) if path.exists() else {}
    if "measured" not in stored:
        raise ConfigError(f"{path}: no measurement to add to; run: python -m benchmarks.true_width.true_width measure")
    compute(cells)
    sound, sick = map(cached, cells)
    mark = str(MARKS[0])
    check = {f"{lr:g}": by_kind(at_lr(sound["shadow"][mark], lr))["Muon"]["rho"] for lr in LRS}
    measured = stored["measured"]
    measured["nats"]["moe"] = nats(width, "moe", cells)
    measured["displacement"]["moe"] = {"updates": sick["updates"], "kinds": by_kind(sick["displacement"])}
    measured["experts"] = provenance(cells) | {"rho_again": check}
    save(path, stored)


def save(path: Path, result: dict[str, Any]) -> None:
    """As JSON with a line for each row of shares, numbers to 5 digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    parts = [f'"experiment": "true_width", "width": {plain["width"]}']
    for phase in ("prediction", "measured"):
        if phase in plain:
            shares = plain[phase].pop("shares")
            lines = ",\n".join(map(json.dumps, shares))
            parts.append(f'"{phase}": {json.dumps(plain[phase])[:-1]}, "shares": [\n{lines}\n]}}')
    write_atomically(path, "{" + ",\n".join(parts) + "}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. 0: done; 2: wrong input; 130: Ctrl-C, finished runs are kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.true_width.true_width", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("phase", choices=("predict", "measure", "experts"))
    parser.add_argument("--width", type=int, default=TRUE_WIDTH, help="a multiple of 192; default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if args.width <= 0 or args.width % 192:
            raise ConfigError(
                f"--width={args.width} must be a multiple of 192: an eighth of it has 12 heads of even width"
            )
        {"predict": predict, "measure": measure, "experts": measure_experts}[args.phase](args.width)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs are kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
