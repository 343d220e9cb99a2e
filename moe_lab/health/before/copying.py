"""A copy of a model that calls nothing of the model's own."""

import copy
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

HOLDERS = (nn.Module, Tensor, MethodType, partial, list, tuple, dict)


def twin_of(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, in which functions that were set on a module, such as the `forward` of a wrapper, hold the copy's modules:
    `copy.deepcopy` leaves functions as they are, and these would compute with the model itself. `memo`, empty, becomes id → copy."""
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        own = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        vars(module).update({name: rebound(function, memo) for name, function in own.items()})
    return twin


def rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """The function with copies in its closure, and in those of the functions that it holds."""
    if not function.__closure__ or id(function) in memo:
        return memo.get(id(function), function)
    cells = tuple(CellType() for _ in function.__closure__)
    twin = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__, memo[id(function)] = function.__kwdefaults__, twin
    for cell, old in zip(cells, function.__closure__, strict=True):
        value = old.cell_contents
        if isinstance(value, FunctionType):
            cell.cell_contents = rebound(value, memo)
        else:  # what is no holder of modules or tensors may be anything, a lock or a file too
            cell.cell_contents = copy.deepcopy(value, memo) if isinstance(value, HOLDERS) else value
    return twin
