"""A watch's readings as a table of text, one line a kind of tensor."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence

import torch

from ..measures import share_of
from .rule import by_kind
from .tracking import Tracked

WIDTHS = {"n": 3, "format": 9, "grad": 4, "norm": 7, "moved": 7, "still": 5, "lately": 6, "arrived": 7}
LEGEND = (
    "format: of parameters/optimizer state. grad: zero, none, or lost: it arrives and nothing moves. norm: the largest seen, "
    "of a tensor. moved: displacement over weight, RMS. still, lately: share of elements with a gradient that are as they "
    "were at the start, at the last reading. arrived: realised over intended displacement, where weights have 16 bits."
)


def table(readings: Sequence[Tracked], step: int, width: int | None = None) -> str:
    """What the last reading says, in lines of at most `width` characters (the terminal's, 80 to 120; 100 in a notebook or a
    file); long names are cut."""
    width = width or min(120, max(80, shutil.get_terminal_size((100, 24)).columns))
    kinds = by_kind(readings)
    room = min(max([*map(len, kinds), 6]), width - sum(WIDTHS.values()) - len(WIDTHS))
    layout = " ".join([f"{{:{room}}}", *(f"{{:>{n}}}" for n in WIDTHS.values())])
    rows = [("tensor", *WIDTHS), *((shortened(kind, room), *cells(mine)) for kind, mine in kinds.items())]
    lines = [layout.format(*row) for row in rows]
    return "\n".join([f"after {step} updates", *lines, *textwrap.wrap(LEGEND, width)])


def cells(mine: Sequence[Tracked]) -> tuple[str, ...]:
    """The columns for tensors of one kind."""
    touched = sum(t.n_touched for t in mine)
    weight = math.sqrt(sum(t.weight_square for t in mine) / sum(t.n_elements for t in mine))
    moved = math.sqrt(sum(t.moved_square for t in mine) / touched) if touched else 0.0
    share, gradients = share_of(mine), {t.gradient for t in mine}
    return (
        str(len(mine)),
        f"{formats(t.param.dtype for t in mine)}/{formats(d for t in mine for d in t.state_dtypes)}",
        gradients.pop() if len(gradients) == 1 else "some",
        f"{max(t.grad_norm for t in mine):.1e}",
        f"{moved / (weight or 1.0):.1e}" if touched else "-",
        f"{sum(t.unchanged for t in mine) / touched:.0%}" if touched else "-",
        f"{sum(t.unchanged_lately for t in mine) / touched:.0%}" if touched else "-",
        f"{share.rho:.0%}" if share else "-",
    )


def formats(dtypes: Iterable[torch.dtype]) -> str:
    """`bf16`, or `fp32+bf16`; `-` for none."""
    names = {str(d).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp"): None for d in dtypes}
    return "+".join(names) or "-"


def shortened(name: str, room: int) -> str:
    """The name with its middle left out, if it is longer than `room`."""
    half = (room - 1) // 2
    return name if len(name) <= room else f"{name[: room - 1 - half]}…{name[len(name) - half :]}"
