"""What a run will take, before it takes anything: parameters, operations, memory, time and money, from its config alone.

Operations follow from the shapes. Memory is read off an update of fake tensors, which have shapes and dtypes and no values.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from moe_lab.config import Config, ConfigError
from moe_lab.model import LanguageModel, build_model, heads, scan
from moe_lab.model.attention import Attention
from moe_lab.model.count import count_parameters, idle
from moe_lab.model.depth import Depth
from moe_lab.optim.groups import group_of

BYTES = {"float32": 4, "bfloat16": 2}
NO_FACTORS = ("A_log", "conv1d.weight")  # of more than one dimension, and no token is multiplied with them
FORMATS = {"float32": ("float32", "float32"), "autocast": ("float32", "bfloat16")}
FORMATS |= {"pure bf16": ("bfloat16", "bfloat16")}

LOOPS = ((heads, "learn"), (heads, "loss_and_slope"), (scan, "scan"), (scan, "adjoint"))  # done thousands of times


class Flops(NamedTuple):
    """Multiplications and additions of one update's matrix products."""

    passes: float  # forward and backward, and the blocks' forward once more where they are recomputed
    optimizer: float  # Muon's, whatever the batch


class Memory(NamedTuple):
    """Bytes on each rank at the fullest moment of an update."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # what the blocks' forward pass keeps, copies of weights in the compute format among them
    logits: float  # and gradients of the heads, which wait for the backward pass
    recomputed: float  # what the backward pass needs beside these: a block's forward pass again, gradients on their way
    gathered: float  # FSDP's: the largest block's weights and gradients, whole


def flops(config: Config) -> Flops:
    """Of one update. A product of (n, a) and (a, b) is 2nab; what is no matrix product, as Mamba's scan, is left out."""
    model = build_model(config.model, device="meta")
    recomputed = config.training.activation_checkpointing
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
        matrices = [p for name, p in layer.named_parameters() if p.ndim > 1 and not name.endswith(NO_FACTORS)]
        active = sum(p.numel() for p in matrices) - idle(layer, config.model)
        total += 2 * (share * active + sum(p.numel() for p in depth.parameters()))
        if isinstance(layer, Attention):  # scores and weighted sum, of all pairs, as is customary: half are masked
            total += share * 4 * share * config.model.max_seq_len * layer.q_proj.out_features
    return total


def newton_schulz(shape: torch.Size, steps: int) -> float:
    """Each step of each matrix of a stack: its Gram matrix, that squared, and the product of the polynomial with it."""
    small, large = sorted(shape[-2:])
    return steps * math.prod(shape[:-2]) * (4 * small**2 * large + 2 * small**3)


def memory(config: Config, ranks: int = 1) -> Memory:
    """`ranks`: over which FSDP shards weights, gradients and the optimizer's state."""
    size = BYTES[config.precision.parameters]
    model = build_model(config.model, device="meta")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    one = sum(n for name, n in sizes.items() if group_of(name) == "muon" and config.optimizer.type == "muon")
    weights, moments = size * sum(sizes.values()), size * (2 * sum(sizes.values()) - one)  # Muon keeps one moment
    units = [*model.layers, model.embedding, *model.lm_heads]
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
    gathered = 2 * BYTES[config.precision.compute] * largest if ranks > 1 else 0
    return Memory(weights / ranks, weights / ranks, moments / ranks, *passes_bytes(config), gathered)


class Live(TorchDispatchMode):
    """Bytes of the tensors that operations return within this context and that live, and the most at once. What a kernel takes
    for itself while it runs is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()  # storages
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":  # which asks a tensor for its device
            return func(*args)
        tree_map_only(Tensor, lambda t: self.known.setdefault(t.untyped_storage(), True), (args, kwargs))  # from before
        is_fake = func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)
        wide = is_fake and args[0].dtype == torch.float32
        if wide:  # torch 2.13 knows its shapes for bfloat16 alone
            args = [a.bfloat16() if a.is_floating_point() else a for a in args]
        out = func(*args, **(kwargs or {}))
        out = out.float() if wide else out
        tree_map_only(Tensor, self.count, out)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known[storage] = True
            self.take(storage.nbytes())
            weakref.finalize(storage, self.take, -storage.nbytes())

    def take(self, n_bytes: int) -> None:
        self.now += n_bytes
        self.most = max(self.most, self.now)

    def once(self, work: Callable) -> Callable:
        """`work` for a loop of many rounds, which leaves nothing but what it returns: from the third round on with tensors of
        such shapes it is counted as in the second, without being done. (The first may fill autocast's cache.)"""
        rounds = defaultdict(list)

        def counted(*args):
            known = rounds[tuple((t.shape, t.dtype) if isinstance(t, Tensor) else t for t in tree_leaves(args))]
            if len(known) == 2:
                taken, out = known[1]
                self.take(taken)
                self.take(-taken)
                return tree_map_only(partial, lambda empty: empty(), out)
            start, before, self.most = self.now, self.most, self.now
            out = work(*args)
            known += [
                (self.most - start, tree_map_only(Tensor, lambda t: partial(torch.empty, t.shape, dtype=t.dtype), out))
            ]
            self.most = max(self.most, before)
            return out

        return counted


def passes_bytes(config: Config) -> tuple[int, int, int]:
    """What one micro-batch's passes hold beside weights and gradients: `activations`, `logits`, `recomputed` of Memory."""
    marks = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LanguageModel(config.model)
        for p in model.parameters():
            p.data = p.data.to(getattr(torch, config.precision.parameters))
        model.recompute_blocks = config.training.activation_checkpointing
        for p in model.parameters():  # gradients, as weights, are counted elsewhere
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with ExitStack() as loops, Live() as live:
            for place in LOOPS:
                loops.enter_context(patch.object(*place, live.once(getattr(*place))))
            ids = torch.zeros(config.training.batch_size, config.model.max_seq_len + 1, dtype=torch.long)
            model.final_norm.register_forward_hook(lambda *_: marks.append(live.now))
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision.compute == "bfloat16"):
                loss = sum(model.report(ids).terms.values())
            forward = live.most
            loss.backward()
        return marks[0], forward - marks[0], live.most - forward


# A published run with Muon in the convention `original`: LR and tokens an update. https://github.com/KellerJordan/modded-nanogpt
PUBLISHED = (0.02, 524_288)


class Cost(NamedTuple):
    updates: int
    flops: float
    hours: float  # of each GPU
    money: float


def cost(config: Config, tflops: float, utilisation: float, price: float, ranks: int = 1) -> Cost:
    """`tflops`: what one GPU could do in the compute format; `utilisation`: the share that it does, 0 to 1; `price`: of one GPU
    for an hour. Raises ConfigError for what is not positive."""
    if min(tflops, utilisation, price, ranks) <= 0 or utilisation > 1:
        given = f"tflops={tflops}, utilisation={utilisation} (at most 1), price={price} and ranks={ranks}"
        raise ConfigError(f"{given} must be > 0")
    total = config.n_steps * sum(flops(config))
    hours = total / (ranks * tflops * 1e12 * utilisation) / 3600
    return Cost(config.n_steps, total, hours, hours * ranks * price)


def batch_lr(tokens: int) -> float:
    """Muon's LR where an update has so many tokens, by the square root: the noise of a gradient of n tokens falls as 1/sqrt(n),
    and so may the step. From PUBLISHED; the rule is Malladi et al.'s of Adam, 2022, https://arxiv.org/abs/2205.10287."""
    lr, batch = PUBLISHED
    return lr * math.sqrt(tokens / batch)


def lines(config: Config, tflops: float, utilisation: float, price: float, ranks: int = 1) -> Iterator[str]:
    """The plan as text. Raises as `cost` does."""
    whole = cost(config, tflops, utilisation, price, ranks)
    each = flops(config)
    tokens = config.tokens_per_step
    n = count_parameters(config.model)
    yield f"parameters: {n.total:,}; a token uses {n.active:,}, with MoD's skips {n.active_with_depth:,.0f}"
    yield f"an update of {tokens:,} tokens, TFLOP: {each.passes / 1e12:.4g} in passes, {each.optimizer / 1e12:.4g} in Muon"
    yield f"{'GB at the fullest moment':24}" + "".join(f"{kind:>12}" for kind in (*Memory._fields, "all"))
    for recomputed, (name, (parameters, compute)) in product((False, True), FORMATS.items()):
        precision = {"parameters": parameters, "compute": compute}
        held = memory(config.with_(precision=precision, training={"activation_checkpointing": recomputed}), ranks)
        yield f"{name + ', recomputed' * recomputed:24}" + "".join(f"{size / 1e9:12.3f}" for size in (*held, sum(held)))
    yield f"{whole.updates:,} updates, {whole.flops:.3g} FLOP: {whole.hours / 24:,.1f} days, {whole.money:,.0f} of money"
    noise, (lr, batch) = math.sqrt(PUBLISHED[1] / tokens), PUBLISHED
    yield f"a gradient is {noise:.3g} times as noisy as one of {batch:,} tokens: Muon's {lr:g} there is {batch_lr(tokens):.2g} here"
