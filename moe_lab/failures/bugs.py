"""Bugs planted on purpose, each a patch from outside on a healthy model or its optimizers. Nothing here is on by default.

B01 and B02 are course/case.yaml's (`moe_lab.course.case.bug("B01")` says it in words); the others are common ones that the
case did not have. Notebooks 01 and 02 plant B08, B03, B05 and B19 in cells of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def cast_parameters(model: nn.Module) -> nn.Module:
    """B01: `model.to(dtype=torch.bfloat16)` before training, and an optimizer on what that leaves."""
    return model.to(dtype=torch.bfloat16)


def lr_of_another_optimizer(max_lr: float) -> float:
    """B02: the LR that suits Muon is replaced by the 3e-4 that is usual for AdamW, whatever was asked for."""
    del max_lr
    return 3e-4


def forget_group(optimizers: list[Optimizer], name: str) -> list[Optimizer]:
    """A parameter group that no optimizer got: the group called `name` is left out. Optimizers left empty are dropped.

    Raises ValueError if there is no such group.
    """
    found = [group for o in optimizers for group in o.param_groups if group.get("name") == name]
    if not found:
        raise ValueError(f"no group is called {name!r}")
    for optimizer in optimizers:
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group not in found]
    return [optimizer for optimizer in optimizers if optimizer.param_groups]


def detach_output(model: nn.Module, path: str) -> None:
    """A branch cut off from learning: what the module at `path` returns is detached."""
    model.get_submodule(path).register_forward_hook(lambda module, args, output: detached(output))


def detached(output: Any) -> Any:
    if output is None:
        return None  # a layer without experts has no routing
    if isinstance(output, Tensor):
        return output.detach()
    return type(output)(*map(detached, output)) if hasattr(output, "_fields") else tuple(map(detached, output))


def freeze(model: nn.Module, path: str) -> None:
    """A module frozen by accident: requires_grad is off for all parameters of the one at `path`."""
    model.get_submodule(path).requires_grad_(False)
