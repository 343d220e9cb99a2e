"""What notebook 02 needs and does not teach: a moved copy, a table, variants of a config, a peer, a slow generation."""

# Shapes: B batch, T time, D d_model.

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_lab import load_config
from moe_lab.config import ROOT, ModelConfig
from moe_lab.model import build_model, count_parameters


def apart(a: Tensor, b: Tensor) -> float:
    """Distance of two results over the size of the second."""
    return ((a - b).norm() / b.norm()).item()


def moved(model: nn.Module, width: int) -> nn.Module:
    """A copy of which every number is off its start value by about 1 / sqrt(width)."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += torch.randn(p.shape, generator=generator).to(p.device) / math.sqrt(width)
    return model


def first_of(model: nn.Module, *kinds: str) -> list[nn.Module]:
    """The first module of each class."""
    return [next(m for m in model.modules() if type(m).__name__ == kind) for kind in kinds]


def case_table() -> dict[str, float]:
    """Parameters of the case's model by part, billions, printed; counted on the meta device."""
    config = load_config(ROOT / "configs/training_1.5b.yaml").model
    shapes = dict(build_model(config, device="meta").named_parameters())
    count = count_parameters(config)

    def size(part: str) -> int:
        return sum(p.numel() for name, p in shapes.items() if part in name)

    table = {
        "all parameters": count.total,
        "without MoD's predictors": count.total - size(".predictor."),
        "experts": sum(p.numel() for p in shapes.values() if p.dim() == 3 and len(p) == config.n_experts),
        "embedding and heads": size("embedding") + size("lm_heads"),
        "active for a token": count.active,
        "active, mean with MoD": count.active_with_depth,
    }
    for name, n in table.items():
        print(f"{name:25} {n / 1e9:6.3f} billion  {n / count.total:4.0%}")
    return {name: n / 1e9 for name, n in table.items()}


def variants(config: ModelConfig) -> dict[str, ModelConfig]:
    """Each mechanism alone, in two layers, and all together."""
    layers = {"moe_layers": (), "mamba_layers": ()}
    plain = replace(config, n_layers=2, mamba_enabled=False, mod_enabled=False, **layers)
    in_mamba = {"mamba_enabled": True, "mamba_layers": (0, 1)}
    return {
        "attention": plain,
        "MoE": replace(plain, moe_layers=(0, 1)),
        "Mamba": replace(plain, **in_mamba),
        "Routing Mamba": replace(plain, **in_mamba, moe_layers=(0, 1)),
        "MoD": replace(plain, mod_enabled=True),
        "all together": config,
    }


@torch.no_grad()
def from_transformers(mamba: nn.Module, config: ModelConfig, x: Tensor) -> float | None:
    """How far the block and transformers' own with the same weights are apart. None where that is not installed."""
    logging.disable(logging.WARNING)  # which libraries it could not load, and that its CUDA kernel is missing
    try:
        import transformers
        from transformers.models.mamba.modeling_mamba import MambaMixer
    except ImportError:
        print("skipped: transformers is not installed here (it comes with the extras test and hf)")
        return None
    finally:
        logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity_error()
    sizes = {"state_size": config.ssm_state_dim, "expand": config.mamba_expand, "conv_kernel": config.mamba_d_conv}
    theirs = transformers.MambaConfig(hidden_size=config.d_model, time_step_rank=config.dt_rank, **sizes)
    mixer = MambaMixer(theirs, layer_idx=0).to(x.device)
    mixer.load_state_dict(mamba.state_dict())  # the names are the same
    return apart(mamba(x)[0], mixer(x))


def numbers_kept(layer: nn.Module, n_tokens: int) -> int:
    """How many numbers a sequence sublayer remembers in generation: keys and values; or window and state."""
    cache = layer.new_cache(1, n_tokens, "cpu", torch.float32)
    return sum(t.numel() for t in ((cache.keys, cache.values) if hasattr(cache, "keys") else cache))


def rises(history: Sequence[float]) -> int:
    """Updates at which the loss stands at three times its best so far, or higher."""
    return sum(history[i] >= 3 * min(history[:i]) for i in range(1, len(history)))


def by_package(block: nn.Module, x: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What a layer does around its sequence sublayer, x (T, D) → (T, D); and the places that the sublayer got."""
    rows = block.seq_depth.choose(x[None], causal)
    y, _ = block.seq_layer(block.seq_norm(rows.x), rows.positions, rows.keep)
    return block.seq_depth.put_back(x[None], y, rows)[0], rows.positions[0]


@torch.no_grad()
def left_over(mamba: nn.Module, u: Tensor, n_tokens: int = 31) -> Tensor:
    """Share of a token in the slowest state (A = -1) of the median channel, 0, 1 … tokens later, on inputs u (B, T, I)."""
    steps = mamba.select(u)[0].mean(dim=(0, 1)).cpu()  # mean step size of each channel
    return torch.exp(-steps[:, None] * torch.arange(n_tokens)).median(dim=0).values


def routing_mamba(config: ModelConfig, device: torch.device) -> nn.Module:
    """A mixture of Mamba blocks with moved numbers."""
    both = replace(config, n_layers=1, mamba_enabled=True, mamba_layers=(0,), moe_layers=(0,), mod_enabled=False)
    return moved(build_model(both, 1, device), config.d_model).layers[0].seq_layer


def causality_maps(changes: Callable, config: ModelConfig, ids: Tensor, seed: int) -> dict[tuple[str, str], Tensor]:
    """`changes(network, ids)` of each variant in both modes, by (variant, mode)."""
    maps = {}
    for name, variant in variants(config).items():
        network = build_model(variant, seed, ids.device)
        for mode in ("evaluation", "training"):
            maps[name, mode] = changes(network.train(mode == "training"), ids)
    return maps


def largest_before(maps: dict[tuple[str, str], Tensor], mode: str) -> dict[str, float]:
    """By variant, the largest change of logits before the changed token."""
    return {name: change.tril(-1).max().item() for (name, of), change in maps.items() if of == mode}


@torch.no_grad()
def loss_of(network: nn.Module, batch: Tensor, training: bool) -> float:
    """The next token's loss in one of both modes, nats per token."""
    weights = network.config.aux_loss_weights
    return network.train(training).losses(batch)["next_token"].item() / weights[0] * sum(weights)


def idle(model: nn.Module, batch: Tensor) -> list[str]:
    """Tensors without a gradient from a batch."""
    network = copy.deepcopy(model).train()
    sum(network.losses(batch).values()).backward()
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


def start_loss(config: ModelConfig, n_tokens: int) -> tuple[float, float]:
    """What a head shows at step 0, nats per token (notebook 01 derives it), and its standard error."""
    variance = config.d_model * config.init_std**2
    return math.log(config.vocab_size) + variance / 2, math.sqrt(variance / n_tokens)


@torch.no_grad()
def generate_slowly(network: nn.Module, ids: Tensor, n_new: int = 16) -> Tensor:
    """The likeliest continuation without caches: the whole text again for each token."""
    for _ in range(n_new):
        ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def blanket(mamba: nn.Module) -> nn.Module:
    """B19: a copy with the bias of the step size set to zero."""
    mamba = copy.deepcopy(mamba)
    mamba.dt_proj.bias.data.zero_()
    return mamba
