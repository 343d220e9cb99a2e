"""Bugs planted on purpose on a healthy model, its optimizers, its loop or its data. Nothing here is on by default.

B03 to B26 are edits of healthy functions, or texts where they are no code (B14, B23). B01, B02 and three common bugs
that the case did not have are functions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from moe_lab.config import ConfigError, ModelConfig, read_yaml
from moe_lab.failures.edits import Edit, applied, by_function, edited, source_of
from moe_lab.model import build_model

# healthy skeletons of what the package does elsewhere, or not at all: B07 and B16 edit them


def loop(n_micro: int, accumulation: int, interval: int, on: Callable[[str], object]) -> None:
    """A training loop without the training: `on` hears of each backward pass, update, log, evaluation and save."""
    update = 0
    for micro in range(n_micro):
        on("backward")
        if (micro + 1) % accumulation == 0:
            on("update")
            update += 1
            if update % interval == 0:
                for what in ("log", "evaluation", "save"):
                    on(what)


def moved(state: dict[str, Tensor], config: ModelConfig, seed: int) -> dict[str, float]:
    """By how much of its start values' size each tensor of a checkpoint is away from them."""
    start = build_model(config, seed).state_dict()
    return {name: ((state[name] - p).norm() / p.norm()).item() for name, p in start.items()}


BUGS = read_yaml(Path(__file__).with_name("bugs.yaml"))


def edits_of(id: str) -> list[Edit]:
    """Raises ConfigError for an id that is no edit."""
    known = BUGS["edits"] | BUGS["others"]
    if id not in known:
        raise ConfigError(f"{id!r} cannot be planted; there are {', '.join(known)}")
    named = ((edit["in"].rpartition("."), edit) for edit in known[id])
    return [Edit(resolve_name(owner), name, edit["old"], edit["new"]) for (owner, _, name), edit in named]


def planted(*ids: str) -> AbstractContextManager[None]:
    """These bugs of the case are in the package while the `with` block runs: build, train and evaluate inside it. Raises
    ConfigError for an id that is no edit, ValueError where the healthy source has moved on."""
    return applied([edit for id in ids for edit in edits_of(id)])


def sources(id: str) -> tuple[str, str]:
    """The healthy and the sick source of a bug, whole functions."""
    if text := BUGS["texts"].get(id):
        return text["healthy"], text["sick"]
    functions = by_function(edits_of(id)).items()
    healthy = {place: source_of(getattr(*place)) for place, _ in functions}
    sick = [edited(healthy[place], edits) for place, edits in functions]
    return "\n\n".join(healthy.values()), "\n\n".join(sick)


def cast_parameters(model: nn.Module) -> nn.Module:
    """B01: `model.to(dtype=torch.bfloat16)` before training, and an optimizer on what that leaves."""
    return model.to(dtype=torch.bfloat16)


def lr_of_another_optimizer(max_lr: float) -> float:
    """B02: the LR that suits Muon is replaced by the 3e-4 that is usual for AdamW, whatever was asked for."""
    return 3e-4


def forget_group(optimizers: list[Optimizer], name: str) -> list[Optimizer]:
    """A parameter group that no optimizer got: the group called `name` is left out. Optimizers left empty are dropped.
    Raises ValueError if there is no such group."""
    found = [group for o in optimizers for group in o.param_groups if group.get("name") == name]
    if not found:
        raise ValueError(f"no group is called {name!r}")
    for optimizer in optimizers:
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group not in found]
    return [optimizer for optimizer in optimizers if optimizer.param_groups]


def detach_output(model: nn.Module, path: str) -> None:
    """A branch cut off from learning: what the module at `path` returns is detached."""
    model.get_submodule(path).register_forward_hook(
        lambda module, args, output: tree_map_only(Tensor, Tensor.detach, output)
    )


def freeze(model: nn.Module, path: str) -> None:
    """A module frozen by accident: requires_grad is off for all parameters of the one at `path`."""
    model.get_submodule(path).requires_grad_(False)
