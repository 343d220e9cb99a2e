"""A watch's readings as a table of text, one line a kind of tensor; what it did not check, and why."""

import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence

import torch

from ..findings import counts
from ..measures import share_of
from .rule import by_kind
from .rules_updates import LOST_UPDATES
from .state import State
from .tracking import Tracked

WIDTHS = {"n": 3, "format": 9, "grad": 4, "norm": 7, "moved": 7, "still": 5, "lately": 6, "arrived": 7}
LEGEND = (
    "format: of parameters/optimizer state. grad: zero, none, or lost: it arrives and nothing moves. norm: the largest seen, "
    "of a tensor. moved: displacement over weight, RMS. still, lately: share of elements with a gradient that are as they "
    "were at the start, at the last reading. arrived: realised over intended displacement, where weights have 16 bits."
)


def table(readings: Sequence[Tracked], step: int) -> str:
    """What the last reading says, as wide as the terminal (80 to 120 characters; 100 in a notebook or a file); long names are
    cut in the middle."""
    width = min(120, max(80, shutil.get_terminal_size((100, 24)).columns))
    kinds = by_kind(readings)
    room = min(max([*map(len, kinds), 6]), width - sum(WIDTHS.values()) - len(WIDTHS))
    half = (room - 1) // 2
    lines = []
    for name, values in [("tensor", WIDTHS), *((kind, cells(mine)) for kind, mine in kinds.items())]:
        if len(name) > room:
            name = f"{name[: room - 1 - half]}…{name[-half:]}"
        columns = [f"{value:>{n}}" for value, n in zip(values, WIDTHS.values(), strict=True)]
        lines.append(" ".join([f"{name:{room}}", *columns]))
    return "\n".join([f"after {step} updates", *lines, *textwrap.wrap(LEGEND, width)])


def cells(mine: Sequence[Tracked]) -> tuple[str, ...]:
    touched = sum(t.n_touched for t in mine)
    weight = math.sqrt(sum(t.weight_square for t in mine) / sum(t.n_elements for t in mine)) or 1.0
    share, gradients = share_of(mine), {t.gradient for t in mine}
    return (
        str(len(mine)),
        f"{formats(t.param.dtype for t in mine)}/{formats(d for t in mine for d in t.state_dtypes)}",
        gradients.pop() if len(gradients) == 1 else "some",
        f"{max(t.grad_norm for t in mine):.1e}",
        f"{math.sqrt(sum(t.moved_square for t in mine) / touched) / weight:.1e}" if touched else "-",
        f"{sum(t.unchanged for t in mine) / touched:.0%}" if touched else "-",
        f"{sum(t.unchanged_lately for t in mine) / touched:.0%}" if touched else "-",
        f"{share.rho:.0%}" if share else "-",
    )


def formats(dtypes: Iterable[torch.dtype]) -> str:
    """`bf16`, or `fp32+bf16`; `-` for none."""
    names = {str(d).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp"): None for d in dtypes}
    return "+".join(names) or "-"


def unchecked(state: State) -> dict[str, str]:
    """What a watch did not judge up to now → why."""
    if not state.n_seen:
        return {"everything": "no update was seen"}
    told = {}
    if state.n_seen < LOST_UPDATES:
        told["what takes time"] = f"{state.n_seen} updates were seen; some rules wait for {LOST_UPDATES}"
    if not state.events.n_observed:
        told["the loss"] = "none was observed: call observe(loss=…) once a step"
    if not state.forward.is_language_model:
        told["learning rates against the usual ones"] = "they are known of language models alone"
    elif not state.is_fresh:
        told["learning rates that are too low"] = "the model was trained before"
    if state.events.n_observed and state.expected_start is None:
        told["the first loss"] = "no head over the vocabulary was heard in an untrained model"
    if not state.events.ears:
        told["the order of zero_grad, backward and step"] = "no tensor that is whole and trained could be listened to"
    told |= state.forward.untried
    told["what only a changed input or weight shows (the future, memory, arguments without effect)"] = "see examine"
    return told


def closing(state: State) -> str:
    """A watch's last line."""
    told = "; ".join(f"{what} ({why})" for what, why in unchecked(state).items())
    found = counts(finding.severity for finding in state.findings)
    return f"after {state.step} updates: {found}; not checked: {told}"
