"""The language model: blocks of a sequence sublayer and a feed-forward sublayer, and several prediction heads."""

# Shapes: B batch, T time, D d_model, V vocabulary, n prediction heads.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_lab.config import ModelConfig
from moe_lab.model.attention import Attention
from moe_lab.model.depth import Depth, DepthReport, agreement, predictor_loss
from moe_lab.model.heads import head_losses
from moe_lab.model.layers import SwiGLU
from moe_lab.model.mamba import Mamba, RoutingMamba
from moe_lab.model.moe import MoE, Routing, load_balancing_loss, router_z_loss


class Output(NamedTuple):
    logits: Tensor  # (B, T, V), the next token's
    future_logits: Tensor  # (n - 1, B, T, V), those of t+2 … t+n
    routing: tuple[Routing, ...]  # one per MoE layer


class Trunk(NamedTuple):
    """What the blocks give before the heads."""

    hidden: Tensor  # (B, T, D), normalised
    routing: tuple[Routing, ...]  # one per MoE layer
    depth: tuple[DepthReport, ...]  # one per MoD sublayer: layer 0's sequence, layer 0's feed-forward, layer 1's …


class Block(nn.Module):
    """x + sublayer(norm(x)), twice. With MoD around each sublayer, only the chosen tokens get the second term."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        is_mamba, is_moe = config.is_mamba(layer), config.is_moe(layer)
        mixer = (RoutingMamba if is_moe else Mamba) if is_mamba else Attention
        self.seq_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.seq_layer = mixer(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = MoE(config) if is_moe and not is_mamba else SwiGLU(config.d_model, config.d_ff)
        self.dropout = nn.Dropout(config.dropout)
        self.seq_depth = Depth(config) if config.mod_enabled else None
        self.ffn_depth = Depth(config) if config.mod_enabled else None

    def forward(self, x: Tensor) -> tuple[Tensor, list[Routing], list[DepthReport]]:
        """x (B, T, D) → x (B, T, D), the routing of an MoE layer, the reports of the MoD routers."""
        routings, reports = [], []
        for norm, layer, depth in self.sublayers():

            def compute(x, positions, keep, norm=norm, layer=layer):
                if isinstance(layer, SwiGLU):
                    return self.dropout(layer(norm(x))), None
                result = layer(norm(x), positions, keep)
                y, routing = result if isinstance(result, tuple) else (result, None)
                return self.dropout(y), routing

            if depth is None:
                y, routing = compute(x, torch.arange(x.shape[1], device=x.device).expand(len(x), -1), None)
                x = x + y
            else:
                x, routing, report = depth(x, compute)
                reports.append(report)
            if routing is not None:
                routings.append(routing)
        return x, routings, reports

    def sublayers(self):
        return (self.seq_norm, self.seq_layer, self.seq_depth), (self.ffn_norm, self.ffn, self.ffn_depth)

    def step(self, x: Tensor, position: int, cache) -> Tensor:
        """One token a row, x (B, 1, D) at `position`, in evaluation mode → (B, 1, D)."""
        for norm, layer, depth in self.sublayers():

            def compute(x, keep, norm=norm, layer=layer):
                if layer is self.seq_layer:
                    return layer.step(norm(x), position, cache, keep)
                y = layer(norm(x))
                return y[0] if isinstance(y, tuple) else y

            everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
            x = depth.step(x, compute) if depth is not None else x + compute(x, everyone)
        return x


class LanguageModel(nn.Module):
    """Embedding, blocks, a last norm, and one untied head for each predicted token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute_blocks = False  # activation checkpointing: set by whoever trains
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        heads = (nn.Linear(config.d_model, config.vocab_size, bias=False) for _ in range(config.n_pred_tokens))
        self.lm_heads = nn.ModuleList(heads)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every start value: matrices normal(0, init_std), norms one, Mamba's own parts by its paper."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.init_std)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, MoE):
                for stack in (module.gate_proj, module.up_proj, module.down_proj):
                    nn.init.normal_(stack, std=self.config.init_std)
        for module in self.modules():
            if isinstance(module, Mamba):
                module.reset_state_space()  # after the loop above: it has its own rule for dt_proj

    def trunk(self, ids: Tensor) -> Trunk:
        """ids (B, T) int64 → the normalised hidden states, the MoE routings, the MoD reports."""
        x = self.embedding(ids)
        routing: list[Routing] = []
        depth: list[DepthReport] = []
        for block in self.layers:
            if self.recompute_blocks and self.training and torch.is_grad_enabled():
                x, routings, reports = checkpoint(block, x, use_reentrant=False)
            else:
                x, routings, reports = block(x)
            routing += routings
            depth += reports
        return Trunk(self.final_norm(x), tuple(routing), tuple(depth))

    def forward(self, ids: Tensor) -> Output:
        """ids (B, T) int64, 0 ≤ id < V → logits of every head and the routing. Any T from 1."""
        hidden, routing, _ = self.trunk(ids)
        logits = [head(hidden) for head in self.lm_heads]
        future = torch.stack(logits[1:]) if len(logits) > 1 else logits[0].new_zeros(0, *logits[0].shape)
        return Output(logits[0], future, routing)

    def losses(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Weighted scalar terms whose sum is the training loss, for windows ids (B, T + 1) int64.

        `next_token`, `future_2` … `future_n` in nats per token, weights normalised to sum 1; `moe_balance` and
        `router_z` summed over MoE layers; `mod_predictor` the mean over MoD sublayers. Terms without a module are
        left out. Where `mask` (B, T + 1) bool is false, a position is never a target.
        """
        hidden, routing, depth = self.trunk(ids[:, :-1])
        terms = head_losses(self.lm_heads, hidden, ids, mask, self.config.aux_loss_weights)
        if routing:
            used = [r for r in routing if len(r.logits)]  # in evaluation MoD may keep no token at all
            zero = hidden.new_zeros(())
            terms["moe_balance"] = self.config.moe_balance_weight * sum(map(load_balancing_loss, used), zero)
            terms["router_z"] = self.config.moe_z_weight * sum(map(router_z_loss, used), zero)
        if depth:
            mean = sum(predictor_loss(report) for report in depth) / len(depth)
            terms["mod_predictor"] = self.config.mod_predictor_weight * mean
        return terms

    @torch.no_grad()
    def depth_agreement(self, ids: Tensor) -> Tensor:
        """(n MoD sublayers,) float32: share of tokens about which evaluation's rule and training's choice agree."""
        return torch.stack([agreement(report) for report in self.trunk(ids).depth])

    def generate(self, prompt, max_new_tokens: int = 100, **options):
        """Continue a prompt; see `moe_lab.model.generate.generate`."""
        from moe_lab.model.generate import generate

        return generate(self, prompt, max_new_tokens, **options)


def build_model(config: ModelConfig, seed: int = 0, device: str | torch.device = "cpu") -> LanguageModel:
    """A model with start values that depend on `seed` alone; the caller's random state is left as it was.

    device="meta" gives shapes without memory. Values are drawn on the CPU, so that every device starts alike.
    Raises ConfigError if the config asks for a kernel that this machine lacks.
    """
    with torch.device("meta"):
        model = LanguageModel(config)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_weights()
    return model.to(device)
