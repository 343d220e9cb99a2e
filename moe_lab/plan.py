"""What a run will take, before it takes anything: operations and memory, from the config alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lab.config import Config
from moe_lab.model import LanguageModel, build_model
from moe_lab.model.attention import Attention
from moe_lab.model.depth import Depth
from moe_lab.model.moe import MoE
from moe_lab.optim.groups import group_of

PASSES = 3  # a backward pass multiplies twice as much as a forward pass


class Flops(NamedTuple):
    """Multiplications and additions of an update's matrix products."""

    passes: float  # forward and backward, and forward once more of blocks that are recomputed
    optimizer: float  # Muon's


def flops(config: Config) -> Flops:
    """Of one update. A product of (n, a) and (a, b) is 2nab; what is no matrix product is left out."""
    model, tokens = build_model(config.model, device="meta"), config.tokens_per_step
    blocks = sum(forward_of(block, config) for block in model.layers)
    heads = sum(2 * p.numel() for p in model.lm_heads.parameters())
    passes = blocks * (PASSES + config.training.activation_checkpointing) + heads * PASSES
    muon = [p for name, p in model.named_parameters() if group_of(name) == "muon"]
    is_muon = config.optimizer.type == "muon"
    return Flops(tokens * passes, sum(newton_schulz(p, config.optimizer.ns_steps) for p in muon) if is_muon else 0.0)


def forward_of(block: nn.Module, config: Config) -> float:
    """Of one token, on average where MoD skips some."""
    total = 0.0
    for _, layer, depth in block.sublayers():
        share = depth.capacity if isinstance(depth, Depth) else 1.0
        matrices = {name: p.numel() for name, p in layer.named_parameters() if is_product(name)}
        weights = sum(
            n * (config.model.moe_top_k / config.model.n_experts if is_stack(layer, name) else 1)
            for name, n in matrices.items()
        )
        total += share * 2 * weights
        if isinstance(layer, Attention):  # scores and their sum, of all pairs: half of them are masked
            total += share * 4 * share * config.model.max_seq_len * layer.q_proj.out_features
        total += sum(2 * p.numel() for p in depth.parameters())
    return total


def is_product(name: str) -> bool:
    return group_of(name) == "muon" or name.split(".")[-2:][0] in ("hidden_proj", "gate")


def is_stack(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, MoE) and not name.startswith("router.")


def newton_schulz(p: Tensor, steps: int) -> float:
    """Gram matrix, its square, and what they do to the matrix, each step, of each matrix of a stack."""
    small, large = sorted(p.shape[-2:])
    return steps * p.numel() / (small * large) * (4 * small**2 * large + 2 * small**3)


def memory(config: Config) -> dict[str, int]:
    """Bytes at the fullest moment of an update: weights, gradients, moments, what the forward pass keeps for the backward."""
    width = {"float32": 4, "bfloat16": 2}[config.precision.parameters]
    model = build_model(config.model, device="meta")
    sizes = {"muon": 0, "rest": 0}
    for name, p in model.named_parameters():
        sizes["muon" if group_of(name) == "muon" and config.optimizer.type == "muon" else "rest"] += p.numel()
    weights = width * sum(sizes.values())
    moments = width * (sizes["muon"] + 2 * sizes["rest"])
    return {"weights": weights, "gradients": weights, "optimizer": moments, "kept": kept_bytes(config)}


def kept_bytes(config: Config) -> int:
    """What a micro-batch's forward pass keeps, parameters apart: asked of a model that has shapes and no memory."""
    own, kept = set(), {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return t

    default = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(getattr(torch, config.precision.parameters))
        try:
            model = LanguageModel(config.model)
        finally:
            torch.set_default_dtype(default)
        model.recompute_blocks = config.training.activation_checkpointing
        own |= {p.untyped_storage()._cdata for p in model.parameters()}
        ids = torch.zeros(config.training.batch_size, config.model.max_seq_len + 1, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=config.precision.compute == "bfloat16"):
            sum(model.report(ids).terms.values())
        return sum(storage.nbytes() for storage in kept.values())
