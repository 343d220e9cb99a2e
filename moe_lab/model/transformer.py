"""The language model: blocks of a sequence sublayer and a feed-forward sublayer, and several prediction heads."""

# Shapes: B batch, T time, D d_model, V vocabulary, n prediction heads.

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_lab.config import ModelConfig
from moe_lab.model.attention import Attention
from moe_lab.model.depth import Depth, DepthReport, EveryToken, agreement, predictor_loss
from moe_lab.model.generate import generate
from moe_lab.model.heads import head_losses
from moe_lab.model.layers import RMSNorm, SwiGLU, dropout
from moe_lab.model.mamba import Mamba, RoutingMamba
from moe_lab.model.moe import MoE, Routing, load_balancing_loss, router_z_loss


class Output(NamedTuple):
    """What `model(ids)` returns."""

    logits: Tensor  # (B, T, V), the next token's
    future_logits: Tensor  # (n - 1, B, T, V), those of t+2 … t+n
    routing: tuple[Routing, ...]  # one per MoE layer


class Trunk(NamedTuple):
    """What the blocks give before the heads."""

    hidden: Tensor  # (B, T, D), normalised
    routing: tuple[Routing, ...]  # one per MoE layer
    depth: tuple[DepthReport, ...]  # one per MoD sublayer: layer 0's sequence, layer 0's feed-forward, layer 1's …


class Losses(NamedTuple):
    """What `model.report(ids)` returns."""

    terms: dict[str, Tensor]  # weighted scalars whose sum is the loss
    routing: tuple[Routing, ...]  # one per MoE layer
    depth: tuple[DepthReport, ...]  # one per MoD sublayer


class Block(nn.Module):
    """x + sublayer(norm(x)), twice. With MoD around each sublayer, only the chosen tokens get the second term. Every
    sublayer is called as `layer(x, positions, keep) → (y, routing or None)`, and in generation with the sequence layer's
    cache behind them."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        is_mamba, is_moe = config.is_mamba(layer), layer in config.moe_layers
        mixer = (RoutingMamba if is_moe else Mamba) if is_mamba else Attention
        self.seq_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.seq_layer = mixer(config)
        self.ffn_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = MoE(config) if is_moe and not is_mamba else SwiGLU(config.d_model, config.d_ff)
        self.dropout = config.dropout
        self.seq_depth, self.ffn_depth = (Depth(config) if config.mod_enabled else EveryToken() for _ in range(2))

    def forward(
        self, x: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[Routing], list[DepthReport]]:
        """x (B, T, D) → x (B, T, D), the routing of an MoE layer, the reports of the MoD routers."""
        routings, reports = [], []
        for norm, layer, depth in self.sublayers():
            rows = depth.choose(x, causal=not self.training)
            y, routing = layer(norm(rows.x), rows.positions, rows.keep)
            if self.training:
                y = dropout(y, self.dropout, generator)
            x = depth.put_back(x, y, rows)
            routings += [] if routing is None else [routing]
            reports += [] if rows.report is None else [rows.report]
        return x, routings, reports

    def sublayers(self) -> tuple[tuple[nn.Module, nn.Module, Depth | EveryToken], ...]:
        """(norm, layer, who chooses its tokens) of the sequence sublayer and of the feed-forward sublayer."""
        return (self.seq_norm, self.seq_layer, self.seq_depth), (self.ffn_norm, self.ffn, self.ffn_depth)

    def step(self, x: Tensor, cache) -> Tensor:
        """A prompt, or one token a row after it, x (B, T, D), as in evaluation whatever the mode → (B, T, D)."""
        for norm, layer, depth in self.sublayers():
            rows = depth.choose(x, causal=True)
            x = depth.put_back(x, layer(norm(rows.x), rows.positions, rows.keep, cache)[0], rows)
        return x


class LanguageModel(nn.Module):
    """Embedding, blocks, a last norm, and one untied head for each predicted token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute_blocks = False  # activation checkpointing: set by whoever trains
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        heads = (nn.Linear(config.d_model, config.vocab_size, bias=False) for _ in range(config.n_pred_tokens))
        self.lm_heads = nn.ModuleList(heads)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every start value: matrices normal(0, init_std), norms one, Mamba's own parts by its paper.

        With `zero_init_output` each sublayer's last matrix is zero instead, so that a block begins as the identity (as in
        Zhang et al. 2019, "Fixup", sec. 3, https://arxiv.org/abs/1901.09321, without its scalars).
        """
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
        if self.config.zero_init_output:
            for name, parameter in self.named_parameters():
                if name.removesuffix(".weight").endswith(("o_proj", "out_proj", "down_proj")):
                    parameter.zero_()

    def trunk(self, ids: Tensor, generator: torch.Generator | None = None) -> Trunk:
        """ids (B, T) int64 → the normalised hidden states, the MoE routings, the MoD reports. Dropout draws from `generator`."""
        x = self.embedding(ids)
        routing: list[Routing] = []
        depth: list[DepthReport] = []
        twice = self.recompute_blocks and self.training and torch.is_grad_enabled()
        for block in self.layers:
            x, routings, reports = recomputed(block, x, generator) if twice else block(x, generator)
            routing += routings
            depth += reports
        return Trunk(self.final_norm(x), tuple(routing), tuple(depth))

    def forward(self, ids: Tensor) -> Output:
        """ids (B, T) int64, 0 ≤ id < V → logits of every head and the routing. Any T from 1."""
        hidden, routing, _ = self.trunk(ids)
        logits = [head(hidden) for head in self.lm_heads]
        future = torch.stack(logits[1:]) if len(logits) > 1 else logits[0].new_zeros(0, *logits[0].shape)
        return Output(logits[0], future, routing)

    def report(self, ids: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Losses:
        """The training loss of windows ids (B, T + 1) int64, term by term, and what the routers did on the way.

        Terms are weighted scalars whose sum is the loss: `next_token`, `future_2` … `future_n` in nats per token, weights
        normalised to sum 1; `moe_balance` and `router_z` summed over MoE layers; `mod_predictor` the mean over MoD
        sublayers. Terms without a module are left out. Where `mask` (B, T + 1) bool is false, a position is never a
        target. Dropout draws from `generator`, which must be on the model's device; None: from the process's own.
        """
        hidden, routing, depth = self.trunk(ids[:, :-1], generator)
        terms = head_losses(self.lm_heads, hidden, ids, mask, self.config.aux_loss_weights)
        if routing:
            used = [r for r in routing if len(r.logits)]  # in evaluation MoD may keep no token at all
            zero = hidden.new_zeros(())
            terms["moe_balance"] = self.config.moe_balance_weight * sum(map(load_balancing_loss, used), zero)
            terms["router_z"] = self.config.moe_z_weight * sum(map(router_z_loss, used), zero)
        if depth:
            mean = sum(predictor_loss(report) for report in depth) / len(depth)
            terms["mod_predictor"] = self.config.mod_predictor_weight * mean
        return Losses(terms, routing, depth)

    def losses(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The terms of `report`, for who needs nothing else."""
        return self.report(ids, mask).terms

    @torch.no_grad()
    def depth_agreement(self, ids: Tensor) -> Tensor:
        """(n MoD sublayers,) float32: share of tokens about which evaluation's rule and training's choice agree."""
        return torch.stack([agreement(report) for report in self.trunk(ids).depth])

    generate = generate


def recomputed(block: Block, x: Tensor, generator: torch.Generator | None):
    """`block(x, generator)`, which the backward pass computes once more in place of keeping what is inside it. It then
    draws the same numbers from a copy of `generator`; of the process's own generators torch takes care."""
    start, noise = generator and generator.clone_state(), generator

    def run(x: Tensor):
        nonlocal noise
        drawn, noise = noise, start and start.clone_state()
        return block(x, drawn)

    return checkpoint(run, x, use_reentrant=False)


def build_model(config: ModelConfig, seed: int = 0, device: str | torch.device = "cpu") -> LanguageModel:
    """A model with start values that depend on `seed` alone, on every device; the caller's random state stays.
    device="meta" gives shapes without memory."""
    with torch.device("meta"):
        model = LanguageModel(config)
    if torch.device(device).type == "meta":
        return model
    model = model.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.init_weights()
    return model.to(device)
