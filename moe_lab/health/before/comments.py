"""Comments that contradict the learning rate they stand beside: "use 0.001 for Muon" next to 0.0003 under Muon."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ..findings import Finding, found
from .plan import FAMILIES, Entry, family

NUMBER = r"(?<![\w.])(?P<{}>\d+(?:\.\d*)?(?:e[+-]?\d+)?)(?![\w.]*\w)"  # to be named
TO = r"\s*(?:-|–|to|and|…|\.\.\.?)\s*"
NOT_A_RATE = rf"(?!\s*(?:[x×%]|times\b|steps?\b|{TO}\d))"  # "Muon takes 3–10 × the LR" names no value
RANGE = rf"{NUMBER.format('low')}(?:{TO}{NUMBER.format('high')})?{NOT_A_RATE}"
NAME = rf"\b(?P<name>(?:{'|'.join(FAMILIES)})\w*)"
SAYS = r"(?::|=|->|→|,|uses?|wants?|needs?|likes?|takes?|at|is|should be|lr|\s)*"
VALUE_FOR_NAME = re.compile(
    rf"{RANGE}\s*[(#,]?\s*(?:is\s+)?(?:for|with|under|in case of|if|when using)\s+(?:the\s+)?{NAME}", re.I
)
NAME_VALUE = re.compile(rf"{NAME}\s*{SAYS}\s*{RANGE}", re.I)
FOR_NAME = re.compile(rf"\bfor\s+(?:the\s+)?{NAME}", re.I)
NEGATED = re.compile(r"(?:\b(?:not|never|no|than|unlike|was|were|instead of|too \w+)|n't)\W+(?:\w+\W+){0,2}$", re.I)


class Statement(NamedTuple):
    """What a comment says about a value: from `low` to `high` for an optimizer; no numbers where it gives none."""

    family: str
    low: float | None = None
    high: float | None = None

    def allows(self, value: float) -> bool:
        if self.low is None:
            return False
        near = any(math.isclose(value, end, rel_tol=1e-6) for end in (self.low, self.high))
        return near or self.low <= value <= self.high


def statements(comment: str) -> list[Statement]:
    """Every "X for NAME", "NAME: X" and "for NAME" of a comment, where NAME is an optimizer and nothing negates it."""
    stated: list[Statement] = []
    taken: list[tuple[int, int]] = []
    for pattern in (VALUE_FOR_NAME, NAME_VALUE, FOR_NAME):
        for match in pattern.finditer(comment):
            if any(match.start() < end and start < match.end() for start, end in taken):
                continue
            taken.append(match.span())
            if NEGATED.search(comment[: match.start()]):
                continue
            parts = match.groupdict()
            low, high = parts.get("low"), parts.get("high")
            ends = sorted(map(float, (low, high or low))) if low else []
            if not ends or ends[1] <= 1:  # a larger number is a count
                stated.append(Statement(family(parts["name"]), *ends))
    return stated


def contradiction(entry: Entry, value: float, optimizer: str | None, where: str) -> Finding | None:
    """A warning if the comments beside or above a learning rate say otherwise; `optimizer` is the family it is for.

    Another number for this optimizer; or no word about it, and the value is said to be for another one (only told where
    Muon is one of the two, whose LRs are numbers of another scale). A comment that agrees anywhere ends the matter.
    """
    stated = [statement for comment in entry.comments for statement in statements(comment.text)]
    mine = [statement for statement in stated if statement.family == optimizer]
    if optimizer is None or any(statement.low is None or statement.allows(value) for statement in mine):
        return None
    quoted = f"the comment at {entry.name}: {value:g} says otherwise: `{quotation(entry)}`"
    if mine:
        low, high = mine[0].low, mine[0].high
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        message = f"{quoted}; the optimizer is {optimizer}, for which it gives {span}"
        advice = f"set {entry.name} to {span}, or correct the comment"
        return found("lr_too_low" if value < low else "lr_too_high", "warning", where, message, advice, value, span)
    others = [statement.family for statement in stated if statement.low is None or statement.allows(value)]
    named = [family(word) for comment in entry.comments for word in re.findall(NAME, comment.text, re.I)]
    if not others or optimizer in named or "muon" not in (optimizer, others[0]):
        return None
    message = f"{quoted}; it means the value for {others[0]}, and the optimizer is {optimizer}"
    advice = f"give {optimizer} a learning rate of its own, or correct the comment"
    return found("muon_convention", "warning", where, message, advice, value)


def quotation(entry: Entry) -> str:
    """The entry's line, and before it those comment lines above it that name an optimizer."""
    above = [f"# {c.text}" for c in entry.comments if c.line != entry.line and statements(c.text)]
    return " ".join(" / ".join([*above, entry.text.strip()]).split())
