"""Torch's random numbers on the CPU and on every device that a model lives on: kept once, put back as often as needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def random_devices(where: nn.Module | Iterable[torch.device]) -> list[torch.device]:
    """Of a model's parameters and buffers, or of these devices, those with a generator of their own beside the CPU's."""
    if hasattr(where, "parameters"):
        where = [t.device for t in (*where.parameters(), *where.buffers())]
    return sorted({device for device in where if device.type not in ("cpu", "meta")}, key=str)


class RandomState:
    """The state of torch's default generators when this was made: the CPU's, and those of a model's devices or of some."""

    def __init__(self, where: nn.Module | Iterable[torch.device]):
        self.cpu, self.others = torch.get_rng_state(), []
        for device in random_devices(where):
            keeper = torch.get_device_module(device)  # torch.cuda, torch.mps, torch.xpu …
            which = () if device.type == "mps" else (device,)  # there is one alone, and its functions take no argument
            self.others.append((keeper, keeper.get_rng_state(*which), which))

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        for keeper, state, which in self.others:
            keeper.set_rng_state(state, *which)
