"""Torch's random numbers on the CPU and on every device that a model lives on: kept once, put back as often as needed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def random_devices(model: nn.Module) -> list[torch.device]:
    """The devices of its parameters and buffers that have a generator of their own beside the CPU's."""
    return with_generators(t.device for tensors in (model.parameters(), model.buffers()) for t in tensors)


def with_generators(devices: Iterable[torch.device]) -> list[torch.device]:
    return sorted({device for device in devices if device.type not in ("cpu", "meta")}, key=str)


class RandomState:
    """The state of torch's default generators when this was made: the CPU's, and those of a model's devices or of some."""

    def __init__(self, where: nn.Module | Iterable[torch.device]):
        devices = random_devices(where) if isinstance(where, nn.Module) else with_generators(where)
        self.cpu = torch.get_rng_state()
        self.devices = [(device, generators(device).get_rng_state(*which(device))) for device in devices]

    def put_back(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices:
            generators(device).set_rng_state(state, *which(device))


def generators(device: torch.device):
    """torch.cuda, torch.mps, torch.xpu …: the module that keeps this kind of device's random state."""
    return torch.get_device_module(device)


def which(device: torch.device) -> tuple[torch.device, ...]:
    """What its functions are told of the device: torch.mps has one, and takes no argument."""
    return () if device.type == "mps" else (device,)
