"""Casts that autocast keeps until its context ends: does a pass compute with the weights that the last update left behind?"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..sampling import Waiting

LOOKS, PICKED = 5, 4  # passes that are looked at; columns of a matrix


class Casts:
    """Looks where an update is made under autocast: that context may end before the next pass, or go on with what it has kept."""

    def __init__(self, model: nn.Module, waiting: Waiting):
        self.model, self.waiting = model, waiting
        self.is_open, self.n_looks = False, 0
        self.stale: list[bool] = []  # by pass that was looked at

    def hooks(self, hook: Callable) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(hook(self.compare))

    def before_update(self) -> None:
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        self.is_open = self.n_looks < LOOKS and torch.is_autocast_enabled(device)

    def compare(self, module: nn.Module, args: tuple) -> None:
        is_apart = torch.is_inference_mode_enabled() or torch.compiler.is_compiling()
        if not self.is_open or not module.training or is_apart:
            return
        self.is_open, self.n_looks = False, self.n_looks + 1
        layers = (m for m in self.model.modules() if type(m) is nn.Linear and type(m.weight) is nn.Parameter)
        weight = next((m.weight for m in layers if m.weight.requires_grad and m.weight.dtype == torch.float32), None)
        if weight is not None and torch.is_autocast_enabled(weight.device.type):
            columns = torch.eye(min(PICKED, weight.shape[1]), weight.shape[1], device=weight.device)
            # older versions of torch keep the cast that is made here, and the pass needs its graph
            with torch.enable_grad():
                used = F.linear(columns, weight).detach()
            self.waiting.add((used != weight[:, :PICKED].T.to(used.dtype)).any(), self.stale.append)
