"""What a checkpoint file holds, read without executing any of it, and where trainers keep what in it."""

from __future__ import annotations

import errno
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS = ("model_state_dict", "state_dict", "model")  # where trainers keep the tensors; or the file is the mapping
NO_MEMORY = re.compile(r"can(?:'t|not) allocate|not enough memory", re.IGNORECASE)


def load(path: Path) -> tuple[Any, str]:
    """What the file holds and an empty text, or None and why it cannot be read. Only tensors and plain values are built.

    Raises ValueError, in one line, where not the file is at fault: no permission, a disk's error, too little memory.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), ""
    except Exception as error:
        no_memory = isinstance(error, MemoryError) or NO_MEMORY.search(str(error))
        # torch looks for the end of a file that is cut short before its beginning: EINVAL
        if no_memory or isinstance(error, OSError) and error.errno != errno.EINVAL:
            reason = "not enough memory" if no_memory else error.strerror or str(error)
            raise ValueError(f"{path}: cannot be read: {reason}") from error
        if asked := re.search(r"GLOBAL (\S+)", str(error)):  # how torch names what it refused to look up
            return None, f"it asks for {asked[1]}, no plain value: reading it could run code, so it was not read"
        return None, f"it is cut short, damaged, or no file of torch.save ({type(error).__name__})"


def weights_of(state: Any) -> dict[str, Tensor]:
    """The named tensors of a checkpoint; empty if there are none."""
    places = [*map(state.get, WEIGHTS), state] if isinstance(state, Mapping) else []
    found = ({str(k): t for k, t in place.items() if isinstance(t, Tensor)} for place in mappings(places))
    return next(filter(None, found), {})


def is_readable(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout is torch.strided and t.device.type == "cpu" and not t.is_quantized


def wide(t: Tensor) -> Tensor:
    """8-bit floats, which have few operations, as float32; every other tensor as it is."""
    return t.float() if t.is_floating_point() and t.itemsize == 1 else t


def numbers(*values: Any) -> list[float]:
    """The finite numbers among values, single ones in tensors and in lists included."""
    finite = []
    for value in values:
        if is_readable(value) and value.numel() == 1:
            value = value.item()
        if isinstance(value, (list, tuple)):
            finite += numbers(*value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            finite.append(float(value))
    return finite


def mappings(values: Any) -> list[Mapping]:
    """Those among a mapping's values or a list's that are mappings themselves; none of anything else."""
    values = list(values.values()) if isinstance(values, Mapping) else values
    return [v for v in values if isinstance(v, Mapping)] if isinstance(values, (list, tuple)) else []


def parts(state: Mapping, word: str) -> list[Mapping]:
    """The mappings that a checkpoint keeps under keys with `word`, singly or in lists."""
    named = [value for key, value in state.items() if word in str(key).lower()]
    return [part for value in named for part in mappings(value if isinstance(value, (list, tuple)) else [value])]


def in_optimizers(state: Mapping, key: str) -> list[Mapping]:
    """The `param_groups` of all stored optimizers, or the `state` of each of their tensors."""
    return [inner for part in parts(state, "optim") for inner in mappings(part.get(key))]


def stored_rates(state: Mapping) -> dict[str, float]:
    """Peak LR of each optimizer group: `initial_lr` where there is one, else `lr`."""
    groups = enumerate(in_optimizers(state, "param_groups"))
    rates = {g.get("name", f"group_{i}"): numbers(g.get("initial_lr"), g.get("lr")) for i, g in groups}
    return {str(name): lr[0] for name, lr in rates.items() if lr}


def optimizer_steps(state: Mapping) -> int | None:
    """The most updates that an optimizer counted for one tensor; None if none counts."""
    counted = numbers(*(entry.get("step") for entry in in_optimizers(state, "state")))
    return int(max(counted)) if counted else None
