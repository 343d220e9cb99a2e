"""What a run will take, before it takes anything: parameters, operations, memory, time and money, from its config alone.

Operations follow from the shapes. Memory is read off an update of fake tensors, which have shapes and dtypes and no values.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from moe_lab.config import Config
from moe_lab.model import LanguageModel, build_model
from moe_lab.model.attention import Attention
from moe_lab.model.count import idle
from moe_lab.model.depth import Depth
from moe_lab.model.moe import MoE
from moe_lab.optim.groups import group_of

BYTES = {"float32": 4, "bfloat16": 2}
FORMATS = {
    "float32": ("float32", "float32"),
    "autocast": ("float32", "bfloat16"),
    "pure bf16": ("bfloat16", "bfloat16"),
}


class Flops(NamedTuple):
    """Multiplications and additions of one update's matrix products."""

    passes: float  # forward and backward, and the blocks' forward once more where they are recomputed
    optimizer: float  # Muon's, whatever the batch


class Memory(NamedTuple):
    """Bytes on each rank at the fullest moment of an update."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float  # FSDP's: the largest block's weights and gradients, whole
    working: float  # what the forward pass keeps, what is recomputed, logits, and what exists only for a moment


def flops(config: Config) -> Flops:
    """Of one update. A product of (n, a) and (a, b) is 2nab; what is no matrix product, as Mamba's scan, is left out."""
    model, recomputed = build_model(config.model, device="meta"), config.training.activation_checkpointing
    blocks = sum(forward_flops(block, config) for block in model.layers)
    heads = sum(2 * p.numel() for p in model.lm_heads.parameters())
    passes = (3 + recomputed) * blocks + 3 * heads  # a backward pass multiplies twice as much as a forward pass
    muon = [p for name, p in model.named_parameters() if group_of(name) == "muon" and config.optimizer.type == "muon"]
    return Flops(config.tokens_per_step * passes, sum(newton_schulz(p.shape, config.optimizer.ns_steps) for p in muon))


def forward_flops(block: nn.Module, config: Config) -> float:
    """Of one token's forward pass through a block, on average where MoD skips some."""
    total = 0.0
    for _, layer, depth in block.sublayers():
        share = depth.capacity if isinstance(depth, Depth) else 1.0
        active = sum(p.numel() for p in matrices(layer)) - (idle(layer, config.model) if isinstance(layer, MoE) else 0)
        total += 2 * (share * active + sum(p.numel() for p in depth.parameters()))
        if isinstance(layer, Attention):  # scores and weighted sum, of all pairs, as is customary: half are masked
            total += share * 4 * share * config.model.max_seq_len * layer.q_proj.out_features
    return total


def matrices(layer: nn.Module) -> Iterator[Tensor]:
    """The parameters that a token is multiplied with."""
    for name, p in layer.named_parameters():
        if p.ndim > 1 and not name.endswith(("A_log", "conv1d.weight")):
            yield p


def newton_schulz(shape: torch.Size, steps: int) -> float:
    """Each step of each matrix of a stack: its Gram matrix, that squared, and the product of the polynomial with it."""
    small, large = sorted(shape[-2:])
    return steps * math.prod(shape[:-2]) * (4 * small**2 * large + 2 * small**3)


def memory(config: Config, ranks: int = 1) -> Memory:
    """`ranks`: over which FSDP shards weights, gradients and the optimizer's state."""
    size, model = BYTES[config.precision.parameters], build_model(config.model, device="meta")
    n = {"muon": 0, "rest": 0}
    for name, p in model.named_parameters():
        n["muon" if group_of(name) == "muon" and config.optimizer.type == "muon" else "rest"] += p.numel()
    weights, moments = size * sum(n.values()), size * (n["muon"] + 2 * n["rest"])
    units = [*model.layers, model.embedding, *model.lm_heads]
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
    gathered = 2 * BYTES[config.precision.compute] * largest if ranks > 1 else 0
    return Memory(weights / ranks, weights / ranks, moments / ranks, gathered, working_bytes(config))


class Live(TorchDispatchMode):
    """Bytes of the tensors that live, made within this context, and the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, out)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def working_bytes(config: Config) -> int:
    """The most that one micro-batch's passes hold beside weights and their gradients."""
    given = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(getattr(torch, config.precision.parameters))
        try:
            model = LanguageModel(config.model)
        finally:
            torch.set_default_dtype(given)
        model.recompute_blocks = config.training.activation_checkpointing
        ids = torch.zeros(config.training.batch_size, config.model.max_seq_len + 1, dtype=torch.long)
        for p in model.parameters():  # gradients are counted elsewhere
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with Live() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision.compute == "bfloat16"):
                loss = sum(model.report(ids).terms.values())
            loss.backward()
        return live.most
