"""Torch's random numbers on the CPU and on every device that a model lives on: kept once, put back as often as needed."""

from __future__ import annotations

import torch
from torch import nn


def random_devices(model: nn.Module) -> list[torch.device]:
    """The devices of its parameters and buffers that have a generator of their own beside the CPU's."""
    found = {t.device for tensors in (model.parameters(), model.buffers()) for t in tensors}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)


class RandomState:
    """The state of torch's default generators when this was made."""

    def __init__(self, model: nn.Module):
        self.cpu = torch.get_rng_state()
        self.devices = [(device, generators(device).get_rng_state(*which(device))) for device in random_devices(model)]

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
