"""How tokens a second change with the length, the experts, the width and the layers, beside what the products' FLOPs predict."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import computes, seconds
from benchmarks.peers import lab, training_step
from benchmarks.shares import flops
from moe_lab import build_model
from moe_lab.config import ModelConfig
from moe_lab.show.style import BLUE, VERMILION, label_right, new_axes, new_figure, png

TOKENS = 2048  # of a step, whatever the length
ROUNDS = 5
SIZES = {
    "max_seq_len": ("tokens of a window", (64, 256, 1024, 2048)),
    "n_experts": ("experts, top-2", (4, 8, 16, 32)),
    "d_model": ("d_model, head and expert sizes in proportion", (96, 192, 384)),
    "n_layers": ("layers, kinds in the default's order", (4, 8, 16)),
}


def varied(name: str, value: int) -> ModelConfig:
    """The default model with one size changed, and what must follow it."""
    model = lab().model
    if name == "d_model":
        by = value / model.d_model
        return replace(model, d_model=value, d_ff=int(by * model.d_ff), d_ff_expert=int(by * model.d_ff_expert))
    if name == "n_layers":
        more = range(0, value, model.n_layers)
        kinds = {key: tuple(a + b for a in more for b in getattr(model, key)) for key in ("moe_layers", "mamba_layers")}
        return replace(model, n_layers=value, **kinds)
    return replace(model, **{name: value})


def curves() -> dict:
    """Of each size: its values, tokens a second (a training step without optimizer, one thread), and FLOPs a token."""
    torch.set_num_threads(1)
    dtype, found = computes()[-1], {}
    for name, (_, values) in SIZES.items():
        found[name] = {"values": values, "tokens_per_s": [], "flops_per_token": []}
        for value in values:
            config = varied(name, value)
            model, ids = (
                build_model(config),
                torch.randint(config.vocab_size, (TOKENS // config.max_seq_len, config.max_seq_len + 1)),
            )
            step = partial(training_step, lambda model=model, ids=ids: sum(model.losses(ids).values()), dtype, model)
            step()
            median = sorted(seconds(step) for _ in range(ROUNDS))[ROUNDS // 2]
            found[name]["tokens_per_s"].append(round(TOKENS / median, 1))
            found[name]["flops_per_token"].append(round(flops(config, 1, config.max_seq_len)))
    return {"dtype": dtype, "curves": found}


def draw(growth: dict, path: Path) -> None:
    """A panel a size: measured, and what FLOPs predict from the default's point."""
    figure = new_figure()
    for index, (name, curve) in enumerate(growth["curves"].items()):
        box = (0.07 + 0.5 * (index % 2), 0.57 - 0.48 * (index // 2), 0.33, 0.36)
        axes = new_axes(figure, box, f"Training step, {growth['dtype']}, one thread", SIZES[name][0], "tokens / s")
        values, speeds, cost = curve["values"], curve["tokens_per_s"], curve["flops_per_token"]
        here = list(values).index(getattr(lab().model, name))
        predicted = [speeds[here] * cost[here] / flops for flops in cost]
        axes.plot(values, speeds, color=BLUE, marker="o", linewidth=1.8)
        axes.plot(values, predicted, color=VERMILION, marker="s", linestyle="--", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_ylim(0, 1.1 * max([*speeds, *predicted]))
        label_right(axes, [(speeds[-1], "measured", BLUE), (predicted[-1], "by FLOPs", VERMILION)])
    path.write_bytes(png(figure))
