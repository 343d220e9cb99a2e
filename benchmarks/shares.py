"""How much of the matrix rate a training step of Mixtral's shape uses, in all and part by part; one thread, CPU time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.measure import interval, seconds
from benchmarks.peers import MIXTRAL, B, T, training_step
from moe_lab import build_model
from moe_lab.config import ModelConfig
from moe_lab.model.count import count_parameters

GOALS = {"float32": 0.75, "bfloat16": 0.5}
ROUNDS = 9


def flops(config: ModelConfig, tokens: int, length: int) -> float:
    """Of a training step's matrix products: 6 for each parameter that meets a token, 2 forward and 4 backward (a head
    that is a table, the embedding, has none), and causal attention's scores. Mamba's scan is no product; norm weights are
    counted with the rest."""
    embedding = config.vocab_size * config.d_model
    n_attention = sum(not config.is_mamba(layer) for layer in range(config.n_layers))
    scores = 6 * n_attention * config.d_model * length  # 2 · (q kᵀ and weights · v) · 3, half of it masked
    return tokens * (6 * (count_parameters(config).active_with_depth - embedding) + scores)


def matrix_rate(dtype: str) -> float:
    """FLOP a second of a product whose three sides are 1024."""
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in "ab")
    times = sorted(seconds(lambda: a @ b) for _ in range(5))
    return 2 * 1024**3 / times[2]


def captured(modules: list[nn.Module], run: Callable[[], object]) -> list[Callable[[], object]]:
    """Calls that repeat those modules' forward and backward passes with the arguments that they get in `run`."""
    calls: list[Callable[[], object]] = []

    def keep(module: nn.Module, args: tuple) -> None:
        def again() -> None:
            fresh = tree_map_only(torch.Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), args)
            found = [t for t in tree_leaves(module(*fresh)) if isinstance(t, torch.Tensor) and t.requires_grad]
            torch.autograd.backward(found, [torch.ones_like(t) for t in found])

        calls.append(again)

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    run()
    for handle in handles:
        handle.remove()
    return calls


def of_step(dtype: str) -> dict:
    """The share of the matrix rate with its interval, and the milliseconds of each part."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, ids = build_model(MIXTRAL), torch.randint(MIXTRAL.vocab_size, (B, T + 1))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def all_of(calls: list[Callable[[], object]]) -> None:
        with autocast():
            for call in calls:
                call()

    with torch.no_grad(), autocast():
        layers = {
            "attention": [block.seq_layer for block in model.layers],
            "experts": [block.ffn for block in model.layers],
            "router": [block.ffn.router for block in model.layers],
        }
        calls = {name: captured(modules, lambda: model.trunk(ids[:, :-1])) for name, modules in layers.items()}
    parts = {name: partial(all_of, several) for name, several in calls.items()}
    parts["trunk"] = partial(training_step, lambda: model.trunk(ids[:, :-1]).hidden.sum(), dtype, model)
    parts["step"] = partial(training_step, lambda: sum(model.losses(ids).values()), dtype, model)
    for part in parts.values():
        part()
    rounds = [
        {name: seconds(part) for name, part in parts.items()} | {"rate": matrix_rate(dtype)} for _ in range(ROUNDS)
    ]
    work = flops(MIXTRAL, B * T, T)
    share = interval([work / r["step"] / r["rate"] for r in rounds])
    ms = {name: interval([1e3 * r[name] for r in rounds])["median"] for name in rounds[0]}
    split = {name: ms[name] for name in ("attention", "router")} | {"experts": ms["experts"] - ms["router"]}
    split |= {"heads and loss": ms["step"] - ms["trunk"], "rest": ms["trunk"] - ms["attention"] - ms["experts"]}
    rate = interval([r["rate"] / 1e9 for r in rounds])["median"]
    made = {"dtype": dtype, "goal": GOALS[dtype], "share": share, "gflops_per_s": rate, "step_gflop": work / 1e9}
    return made | {"step_ms": ms["step"], "parts_ms": {name: round(value, 2) for name, value in split.items()}}
