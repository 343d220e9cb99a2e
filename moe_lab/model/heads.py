"""Multi-token prediction: head k predicts the token k + 1 places ahead, from the same hidden state."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from moe_lab.model.layers import autocast_dtype

LOGITS = 2**24  # that a loss makes at once: 64 MB in float32
CACHED = 2**18  # of these a CPU takes so many at a time, which its cache holds


def targets_of(ids: Tensor, mask: Tensor | None, ahead: int) -> Tensor:
    """Targets `ahead` ≥ 1 places on: (B, T + 1) → (B, T + 1 - ahead) int64, -100 where `mask` says: never a target."""
    targets = ids[:, ahead:]
    return targets if mask is None else targets.masked_fill(~mask[:, ahead:], -100)


def token_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats over the targets (B, T) that are not -100, 0 if there is none; hidden (B, T, D)."""
    learns = torch.is_grad_enabled()
    weights = [p for p in head.parameters() if p.requires_grad]
    total = HeadLoss.apply(hidden.flatten(0, 1), targets.flatten(), head, learns, *weights)
    return total / (targets != -100).sum().clamp(min=1)


def loss_and_slope(logits: Tensor, index: Tensor, counts: Tensor, slope: Tensor) -> Tensor:
    """Summed cross-entropy of logits (N, V) with index (N, 1) where counts (N, 1); its gradient, as if all counted, into
    slope (N, V)."""
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    # log-sum-exp by the likeliest token, whose probability does not underflow
    whole = logits.amax(dim=-1, keepdim=True).float() - probs.amax(dim=-1, keepdim=True).log()
    slope.copy_(probs.scatter_add_(1, index, probs.new_full(index.shape, -1.0)))
    return ((whole - logits.gather(1, index)) * counts).sum()


def learn(head: nn.Module, weights: Sequence[Tensor], learns: bool, total: Tensor, *rows: Tensor) -> list[Tensor]:
    """Add to `total` the loss of rows: hidden (N, D), index and counts (N, 1). Returns gradients by hidden and by `weights`,
    none if nothing is to learn or a hook cut the logits off."""
    hidden, index, counts = rows
    with torch.set_grad_enabled(learns):
        x = hidden.detach() * counts  # what does not count teaches nothing
        x = x.to(autocast_dtype(x)).requires_grad_()  # of a leaf that it casts autocast would keep both
        logits = head(x)
    n_cached = max(1, CACHED // head.out_features) if logits.is_cpu else len(logits)
    if not logits.requires_grad:
        targets = index.masked_fill(~counts, -100).squeeze(1)
        for some, of in zip(logits.split(n_cached), targets.split(n_cached), strict=True):
            total += F.cross_entropy(some.float(), of, reduction="sum")
        return []
    slope = torch.empty_like(logits, requires_grad=False)
    for part in zip(*(t.split(n_cached) for t in (logits.detach(), index, counts, slope)), strict=True):
        total += loss_and_slope(*part)
    by_rows, *by_weights = torch.autograd.grad(logits, (x, *weights), slope)
    return [(by_rows * counts).type_as(hidden), *by_weights]


class HeadLoss(Function):
    """Summed cross-entropy of head(hidden), hidden (N, D), targets (N,); LOGITS logits exist at a time. If `learns`,
    gradients are made in the forward pass, as `F.linear_cross_entropy` does, which on a CPU multiplies bfloat16 in
    float32 and in chunks of few rows. The module is called for each chunk: its hooks see the logits."""

    @staticmethod
    def forward(ctx, hidden, targets, head, learns, *weights):
        total, slopes = hidden.new_zeros((), dtype=torch.float32), []
        sums: list[Tensor] = []  # of the weights' gradients
        index, counts = targets.unsqueeze(1).clamp(min=0), (targets != -100).unsqueeze(1)  # (N, 1)
        chunks = (t.split(max(1, LOGITS // head.out_features)) for t in (hidden, index, counts))
        for rows in zip(*chunks, strict=True):
            if made := learn(head, weights, learns, total, *rows):
                slopes.append(made[0])
                sums = [a.add_(b) for a, b in zip(sums, made[1:], strict=True)] if sums else made[1:]
        ctx.save_for_backward(*([torch.cat(slopes), *sums] if slopes else ()))
        return total

    @staticmethod
    def backward(ctx, grad):
        by_hidden, *by_weights = [t * grad for t in ctx.saved_tensors] or [None] * (len(ctx.needs_input_grad) - 3)
        return by_hidden, None, None, None, *by_weights


def head_losses(
    heads: Iterable[nn.Module], hidden: Tensor, ids: Tensor, mask: Tensor | None, weights: Sequence[float]
) -> dict[str, Tensor]:
    """`next_token`, `future_2` …: each head's weighted loss, nats per token; hidden (B, T, D), ids (B, T + 1). Source:
    Gloeckle et al. 2024, sec. 2, https://arxiv.org/abs/2404.19737, with linear heads on one trunk where theirs are
    transformer layers, and with weights, as the case has it."""
    terms = {}
    for index, (head, weight) in enumerate(zip(heads, weights, strict=True)):
        targets = targets_of(ids, mask, index + 1)  # (B, T - index)
        name = "next_token" if index == 0 else f"future_{index + 1}"
        terms[name] = weight / sum(weights) * token_loss(head, hidden[:, : targets.shape[1]], targets)
    return terms
