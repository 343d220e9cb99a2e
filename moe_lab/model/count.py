"""How many parameters a config has, without allocating one."""

from typing import NamedTuple

from torch import nn

from moe_lab.config import ModelConfig
from moe_lab.model.depth import Depth
from moe_lab.model.moe import MoE
from moe_lab.model.transformer import build_model


class ParameterCount(NamedTuple):
    """`active` are the parameters that take part in computing one token that no MoD router skips."""

    total: int
    active: int  # of E experts, K; of a Routing Mamba all, since every expert scans every token
    active_with_depth: float  # the same on average over tokens: an MoD sublayer counts with its capacity


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count from the meta device: seconds for any size, no memory. The embedding counts whole, as is customary."""
    model = build_model(config, device="meta")
    active = total = sum(p.numel() for p in model.parameters())
    skipped = 0.0
    for norm, layer, depth in (sublayer for block in model.layers for sublayer in block.sublayers()):
        active -= idle(layer, config)
        if isinstance(depth, Depth):
            size = sum(p.numel() for module in (norm, layer) for p in module.parameters())
            skipped += (1 - depth.capacity) * (size - idle(layer, config))
    return ParameterCount(total, round(active), active - skipped)


def idle(layer: nn.Module, config: ModelConfig) -> float:
    """Parameters of a sublayer that a token does not use: the experts that it is not sent to."""
    if not isinstance(layer, MoE):
        return 0.0
    experts = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("router."))
    return (1 - config.moe_top_k / config.n_experts) * experts
