"""Torch's random numbers on the CPU and on every device of some tensors: kept once, put back at a `with`'s end or as often as
needed."""

from collections.abc import Iterable

import torch
from torch import Tensor


class RandomState:
    def __init__(self, tensors: Iterable[Tensor]):
        self.cpu, self.others = torch.get_rng_state(), []
        for device in {t.device for t in tensors if t.device.type not in ("cpu", "meta")}:
            keeper = torch.get_device_module(device)  # torch.cuda, torch.mps, torch.xpu …
            which = () if device.type == "mps" else (device,)  # there is one alone, and its functions take no argument
            self.others.append((keeper, keeper.get_rng_state(*which), which))

    def __enter__(self) -> "RandomState":
        return self

    def __exit__(self, *error: object) -> None:
        self.put_back()

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        for keeper, state, which in self.others:
            keeper.set_rng_state(state, *which)
