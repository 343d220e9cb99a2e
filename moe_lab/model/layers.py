"""The parts that every block shares: the dense feed-forward sublayer, the small MLP of the routers, dropout."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class RMSNorm(nn.RMSNorm):
    """torch's, in fewer passes where it has no kernel of its own: on a CPU it is put together from small operations."""

    def forward(self, x: Tensor) -> Tensor:
        # a token in generation: the fewer calls, the better
        is_token = not torch.is_grad_enabled() and x.ndim == 3 and x.shape[1] == 1
        return super().forward(x) if is_token or not x.is_cpu else Normalise.apply(x, self.weight, self.eps)


class Normalise(Function):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, computed in float32; in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        by_weight = grad * unit
        grad_weight = by_weight.flatten(0, -2).sum(0).type_as(weight)
        along = by_weight.mul_(weight).mean(dim=-1, keepdim=True)  # what would only change the length
        return (grad.float() * weight - unit * along).mul_(scale).type_as(x), grad_weight, None


class SwiGLU(nn.Module):
    """Gated feed-forward sublayer of Shazeer 2020, eq. 6, without biases. https://arxiv.org/abs/2002.05202"""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor, *_: object) -> tuple[Tensor, None]:
        """(…, d_model) → (…, d_model), and no routing. Each token by itself: nothing else is needed."""
        x = x.to(autocast_dtype(x))  # once for both
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


class RouterMLP(nn.Module):
    """Scores a token: d_model → hidden → n_out with SiLU, or one linear map where `hidden` is 0. Always computed in
    float32, whatever autocast says: a choice hangs on small differences between scores."""

    def __init__(self, d_model: int, hidden: int, n_out: int):
        super().__init__()
        self.hidden_proj = nn.Linear(d_model, hidden, bias=False) if hidden else None
        self.gate = nn.Linear(hidden or d_model, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_model) of any float dtype → (…, n_out) float32."""
        x = x.float()
        with no_autocast(x):
            if self.hidden_proj is not None:
                x = F.silu(F.linear(x, self.hidden_proj.weight.float()))
            return F.linear(x, self.gate.weight.float())


def dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """F.dropout in training, whose noise comes from `generator`; None: from the process's own, which anybody may draw from."""
    if p == 0:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p)


def no_autocast(x: Tensor):
    """A context in which operations on x's device keep the dtype they are given."""
    return torch.autocast(x.device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """In which autocast would multiply x: who multiplies it several times casts it once."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
