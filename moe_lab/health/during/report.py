"""What a watch says: its findings, the file that they are written to, and what need not be said again; its readings as a table
of text, one line a kind of tensor; what it did not check, and why."""

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ..findings import SEVERITIES, Finding, counts
from ..measures import share_of
from .rule import by_kind
from .rules_updates import LOST_UPDATES
from .state import State
from .tracking import Tracked

STANDS = "what was found before stands; the training itself is not affected"
FAILED_TWICE = "the watch failed, and failed again while it said so"
LAST_WORDS = Finding("not_measured", "warning", "the watch", FAILED_TWICE, STANDS)  # made before anything can go wrong
WIDTHS = {"n": 3, "format": 9, "grad": 4, "norm": 7, "moved": 7, "still": 5, "lately": 6, "arrived": 7}
LEGEND = (
    "format: of parameters/optimizer state. grad: zero, none, some (of these tensors), or lost: it arrives and nothing moves. "
    "norm: the largest gradient's, of a tensor. moved: displacement over weight, RMS. still, lately: share of elements with a gradient that are as they "
    "were at the start, at the last reading. arrived: realised over intended displacement, where weights have 16 bits."
)


class Published:
    """Findings in their order. Each rule names a subject (a kind of tensor, a group, the loss) once at a severity, and not at a
    lower one afterwards. Each is printed to stderr when it is made, unless `quiet`.

    A resumed run's begins with what stands in its file up to `start_step`. The file does not hold subjects: those rules name
    nothing more at that severity.
    """

    def __init__(self, log: str | Path | None, start_step: int, quiet: bool):
        self.quiet = quiet
        self.log = None if log is None else Path(log)
        self.findings = open_log(self.log, start_step) if self.log else []
        # by rule and subject (None: all), the gravest severity told
        self.gravest: dict[tuple[str, str | None], int] = {}
        for finding in self.findings:
            self.note(finding, [finding.where if finding.rule == "not_measured" else None])

    def note(self, finding: Finding, subjects: list[str | None]) -> None:
        for key in ((finding.rule, subject) for subject in subjects):
            level = SEVERITIES.index(finding.severity)
            self.gravest[key] = min(level, self.gravest.get(key, level))

    def is_news(self, rule: str, severity: str, subject: str) -> bool:
        before = min(self.gravest.get((rule, key), len(SEVERITIES)) for key in (subject, None))
        return SEVERITIES.index(severity) < before

    def say(self, line: str) -> None:
        """To stderr, wherever that is by now: a closed or full one ends no training."""
        if line and not self.quiet and sys.stderr is not None:
            with suppress(OSError, ValueError):
                print(" ".join(line.split()), file=sys.stderr, flush=True)

    def add(self, finding: Finding, subjects: list[str]) -> None:
        self.note(finding, subjects)
        self.findings.append(finding)
        self.say(str(finding))
        if self.log:
            try:
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(finding.to_dict(), ensure_ascii=False) + "\n")
            except OSError as error:
                path, self.log = self.log, None
                self.add_failure(error, str(path), "findings are no longer written there", finding.step)

    def add_failure(self, error: Exception, where: str, what: str, step: int | None, severity: str = "warning") -> None:
        """Say once for each `where` what cannot be measured."""
        if self.is_news("not_measured", severity, where):
            message = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.add(Finding("not_measured", severity, where, message, STANDS, step=step), [where])


def open_log(path: Path, start_step: int) -> list[Finding]:
    """What a resumed run has found before, from a file that can be appended to; its folder is made if need be.

    Findings beyond `start_step`, and a line that a kill cut short, are taken out of the file of a resumed run; that of a new
    one is left as it is. Raises ValueError if the file cannot be written or holds something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if start_step else []
        told = [(line, Finding(**json.loads(line))) for line in lines if line.endswith("\n")]
        kept = [(line, finding) for line, finding in told if (finding.step or 0) <= start_step]
        if len(kept) < len(lines):
            temporary = path.with_name(path.name + ".part")
            temporary.write_text("".join(line for line, _ in kept), encoding="utf-8")
            temporary.replace(path)
    except OSError as error:
        raise ValueError(f"log={str(path)!r} cannot be written: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"log={str(path)!r} holds no findings: {error}; give another, or move it") from error
    return [finding for _, finding in kept]


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
    if state.events.n_observed and state.events.targets_move:
        told["whether the loss falls"] = (
            "its targets may move: opponents are trained, or the model's own answers make its data"
        )
    if not state.outside.reached.has_loss:
        told["how outputs are held against targets"] = (
            "no loss was observed that still has its graph: observe(loss=loss)"
        )
    if not state.events.looks:
        told["the order of zero_grad, backward and step"] = "no tensor that is whole and trained could be listened to"
    told |= state.forward.untried
    future = "" if state.forward.heard.was_tried else "the future, "
    told[f"what only a changed input or weight shows ({future}memory, arguments without effect)"] = "see examine"
    return told


def closing(state: State) -> str:
    """A watch's last line."""
    told = "; ".join(f"{what} ({why})" for what, why in unchecked(state).items())
    found = counts(finding.severity for finding in state.findings)
    return f"after {state.step} updates: {found}; not checked: {told}"
