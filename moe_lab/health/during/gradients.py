"""What a watch takes from one optimizer's step: the gradients that arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..findings import grouped
from ..sampling import plain
from ..torch_private import norms
from .tracking import Tracked


class Gradients:
    """Who has a gradient, how large, and which sampled elements; norms stay on their device until `fetch`."""

    def __init__(self) -> None:
        self.waiting: list[tuple[list[Tracked], Tensor, Tensor | None]] = []

    def read(self, tensors: Sequence[Tracked], optimizer: Optimizer) -> None:
        dense = []
        for t in tensors:
            if t.param.grad is None:
                t.no_gradient += t.param.requires_grad
            elif t.param.grad.is_sparse:
                t.sparse = True
                t.with_gradient += 1
            else:
                dense.append(t)
        # a fused optimizer under a loss scaler is handed scaled gradients, and skips its step if one is infinite
        scale, skipped = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        alike = grouped(dense, lambda t: (t.bank, t.param.grad.dtype.itemsize < 4))
        for (bank, narrow), here in alike.items():
            bank().touch(here)
            # the norm of a float16 gradient may be beyond float16
            sizes = norms([plain(t.param.grad) for t in here], torch.float32 if narrow else None)
            self.waiting.append((here, sizes if scale is None else sizes / scale.to(sizes.device), skipped))

    def fetch(self) -> None:
        for tensors, sizes, skipped in self.waiting:
            if skipped is not None and skipped.item():
                continue
            for t, norm in zip(tensors, sizes.tolist(), strict=True):
                t.finite &= math.isfinite(norm)
                t.grad_norm = max(t.grad_norm, norm if math.isfinite(norm) else 0.0)
                t.with_gradient += norm != 0
                t.zero_gradient += norm == 0
        self.waiting = []
