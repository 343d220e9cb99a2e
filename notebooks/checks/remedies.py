"""What notebooks 03 and 03a try beside the package's remedies for bf16 parameters: two poor ones, which do not address
the loss of updates at all, and casts that leave one kind of tensor in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

from moe_lab.config import OptimizerConfig
from moe_lab.optim import build_optimizers
from moe_lab.optim.rounding import REMEDIES as KEEPING
from moe_lab.optim.rounding import Remedy


def norm_weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("norm.weight")]


def faster_norms(model: nn.Module, config: OptimizerConfig, max_lr: float) -> list[Optimizer]:
    """Plain bf16 parameters; the RMSNorm weights in a group `norms` of their own, at ten times the LR."""
    norms = set(norm_weights(model))
    optimizers = build_optimizers(model.to(torch.bfloat16), config, max_lr)
    group = optimizers[-1].param_groups[-1]  # AdamW's, of what does not decay
    norms_group = group | {key: 10 * group[key] for key in ("lr", "initial_lr")}
    norms_group |= {"params": [p for p in group["params"] if p in norms], "name": "norms"}
    group["params"] = [p for p in group["params"] if p not in norms]
    optimizers[-1].add_param_group(norms_group)
    return optimizers


def smaller_norms(model: nn.Module, config: OptimizerConfig, max_lr: float) -> list[Optimizer]:
    """Plain bf16 parameters; the RMSNorm weights start at 0.1 in place of 1, where bf16 is about ten times finer."""
    for p in norm_weights(model):
        nn.init.constant_(p, 0.1)
    return build_optimizers(model.to(torch.bfloat16), config, max_lr)


def partly_cast(kept: Sequence[str], model: nn.Module, config: OptimizerConfig, max_lr: float) -> list[Optimizer]:
    """bf16 parameters, but those whose names hold one of `kept` stay in float32."""
    exact = {p: p.detach().clone() for name, p in model.named_parameters() if any(part in name for part in kept)}
    model.to(torch.bfloat16)
    for p, value in exact.items():
        p.data = value
    return build_optimizers(model, config, max_lr)


REMEDIES: dict[str, Remedy] = KEEPING | {"norm_lr_x10": faster_norms, "norms_at_0.1": smaller_norms}
# What stays in float32 while the rest is cast, by kind of tensor; the first is practitioners' remedy. Such a Trainer's config
# says `precision.parameters: float32`: nothing is left for it to cast.
KEPT = {
    "norms": ("norm.weight",),
    "Mamba's vectors": ("A_log", ".D", "dt_proj.bias", "conv1d"),
}
PARTLY: dict[str, Remedy] = {f"{kind} in float32": partial(partly_cast, parts) for kind, parts in KEPT.items()}
NAMED = {name: (name, remedy) for name, remedy in (REMEDIES | PARTLY).items()}  # as an arm of an experiment takes it
