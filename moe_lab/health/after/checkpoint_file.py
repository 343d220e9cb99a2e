"""What a checkpoint file holds, read without executing any of it, and where trainers keep what in it."""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..during.intended import KEEPS_BITS

WEIGHTS = ("model_state_dict", "state_dict", "model")  # where trainers keep the tensors; or the file is the mapping


def load(path: Path) -> tuple[Any, str]:
    """What the file holds and an empty text, or None and why it cannot be read. Only tensors and plain values are built."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats; what matters becomes a finding
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), ""
    except Exception as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))  # how torch names what it refused to look up
        if asked:
            return None, f"it asks for {asked.group(1)}, no plain value: reading it could run code, so it was not read"
        return None, f"it is cut short, damaged, or no file of torch.save ({type(error).__name__})"


def weights_of(state: Any) -> dict[str, Tensor]:
    """The named tensors of a checkpoint; empty if there are none."""
    if not isinstance(state, Mapping):
        return {}
    for values in (*(state.get(key) for key in WEIGHTS), state):
        if isinstance(values, Mapping):
            tensors = {str(name): t for name, t in values.items() if isinstance(t, Tensor)}
            if tensors:
                return tensors
    return {}


def is_readable(t: Tensor) -> bool:
    return t.layout is torch.strided and t.device.type == "cpu" and not t.is_quantized


def parts(state: Mapping, word: str) -> Iterator[Mapping]:
    """The mappings that a checkpoint keeps under keys with `word`, singly or in lists."""
    for key, value in state.items():
        if word in str(key).lower():
            yield from (
                one for one in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(one, Mapping)
            )


def numbers(values: Iterable[Any]) -> list[float]:
    """The finite numbers among values, single ones in tensors and in lists included."""
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += numbers(value)
        elif isinstance(value, Tensor) and value.numel() == 1 and is_readable(value):
            found += numbers([value.item()])
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            found.append(float(value))
    return found


def param_groups(state: Mapping) -> list[Mapping]:
    groups = [part.get("param_groups") for part in parts(state, "optim")]
    return [g for some in groups if isinstance(some, (list, tuple)) for g in some if isinstance(g, Mapping)]


def learning_rates(state: Mapping) -> dict[str, float]:
    """Peak LR of each optimizer group: `initial_lr` where there is one, else `lr`."""
    rates = {}
    for index, group in enumerate(param_groups(state)):
        lr = numbers([group.get("initial_lr"), group.get("lr")])
        if lr:
            rates[str(group.get("name", f"group_{index}"))] = lr[0]
    return rates


def optimizer_steps(state: Mapping) -> int | None:
    """The most updates that an optimizer counted for one tensor; None if none counts."""
    states = [part.get("state") for part in parts(state, "optim")]
    entries = [e for some in states if isinstance(some, Mapping) for e in some.values() if isinstance(e, Mapping)]
    return int(max(counted)) if (counted := numbers(entry.get("step") for entry in entries)) else None


def updates_of(state: Mapping) -> int | None:
    """Updates done: what the optimizer counted, else the checkpoint's own step; None if neither is there."""
    counted = optimizer_steps(state)
    steps = numbers([counted, state.get("step"), state.get("global_step")])
    return int(steps[0]) if steps else None


def wide(t: Tensor) -> Tensor:
    """8-bit floats, which have few operations, as float32; every other tensor as it is."""
    return t.float() if t.is_floating_point() and t.itemsize == 1 else t


def keeps_lost_bits(optimizers: list[Mapping]) -> bool:
    """Whether an optimizer's stored state has float32 masters or Kahan compensation, or says that it rounds stochastically."""
    for part in optimizers:
        entries = part.get("state")
        inner = [e for e in entries.values() if isinstance(e, Mapping)] if isinstance(entries, Mapping) else []
        groups = [g for g in part.get("param_groups") or () if isinstance(g, Mapping)]
        if any(KEEPS_BITS.search(str(key)) or "fp32" in str(key) for keys in (part, *inner) for key in keys):
            return True
        if any(
            "stochastic" in f"{key} {value}".lower() and value
            for g in groups
            for key, value in g.items()
            if key != "params"
        ):
            return True
    return False


def kind_of(name: str) -> str:
    """What a tensor is: all norms' weights together, else the name with its numbers left out."""
    *module, last = name.split(".")
    if module and re.search(r"norm|(?:^|_)ln", module[-1].lower()):
        return f"norm {'biases' if last == 'bias' else 'weights'}"
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return kinds
