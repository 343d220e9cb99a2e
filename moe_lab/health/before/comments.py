"""Comments that contradict the learning rate they stand beside: "use 0.001 for Muon" next to 0.0003 under Muon."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from ..findings import Finding
from .plan import FAMILIES, Entry, family

NUMBER = r"(?<![\w.])(\d+(?:\.\d*)?(?:e[+-]?\d+)?)(?![\w.]*\w)"
TO = r"\s*(?:-|–|to|and|…|\.\.\.?)\s*"
NOT_A_RATE = rf"(?!\s*(?:[x×%]|times\b|steps?\b|{TO}\d))"  # "Muon takes 3–10 × the LR" names no value
RANGE = rf"{NUMBER}(?:{TO}{NUMBER})?{NOT_A_RATE}"
NAME = rf"\b((?:{'|'.join(FAMILIES)})\w*)"
SAYS = r"(?::|=|->|→|,|uses?|wants?|needs?|likes?|takes?|at|is|should be|lr|\s)*"
VALUE_FOR_NAME = re.compile(
    rf"{RANGE}\s*[(#,]?\s*(?:is\s+)?(?:for|with|under|in case of|if|when using)\s+(?:the\s+)?{NAME}", re.I
)
NAME_VALUE = re.compile(rf"{NAME}\s*{SAYS}\s*{RANGE}", re.I)
FOR_NAME = re.compile(rf"\bfor\s+(?:the\s+)?{NAME}", re.I)
NEGATED = re.compile(r"(?:\b(?:not|never|no|than|unlike|was|were|instead of|too \w+)|n't)\W+(?:\w+\W+){0,2}$", re.I)


class Said(NamedTuple):
    """What a comment says about a value: from `low` to `high` for an optimizer; no numbers where it gives none."""

    family: str
    low: float | None = None
    high: float | None = None

    def allows(self, value: float) -> bool:
        if self.low is None:
            return False
        near = any(math.isclose(value, end, rel_tol=1e-6) for end in (self.low, self.high))
        return near or self.low <= value <= self.high


def statements(comment: str) -> list[Said]:
    """Every "X for NAME", "NAME: X" and "for NAME" of a comment, where NAME is an optimizer and nothing negates it."""
    said: list[Said] = []
    taken: list[tuple[int, int]] = []
    for pattern, order in ((VALUE_FOR_NAME, (2, 0, 1)), (NAME_VALUE, (0, 1, 2)), (FOR_NAME, None)):
        for match in pattern.finditer(comment):
            if any(match.start() < end and start < match.end() for start, end in taken):
                continue
            taken.append(match.span())
            if NEGATED.search(comment[: match.start()]):
                continue
            if order is None:
                said.append(Said(family(match.group(1))))
                continue
            name, first, second = (match.groups()[index] for index in order)
            ends = sorted(float(number) for number in (first, second or first))
            if ends[1] <= 1:  # a larger number is a count
                said.append(Said(family(name), *ends))
    return said


def contradiction(entry: Entry, value: float, optimizer: str | None, where: str) -> Finding | None:
    """A warning if the comments beside or above a learning rate say otherwise; `optimizer` is the family it is for.

    Another number for this optimizer; or no word about it, and the value is said to be for another one (only told where
    Muon is one of the two, whose LRs are numbers of another scale). A comment that agrees anywhere ends the matter.
    """
    said = [statement for comment in entry.comments for statement in statements(comment.text)]
    mine = [statement for statement in said if statement.family == optimizer]
    if optimizer is None or any(statement.low is None or statement.allows(value) for statement in mine):
        return None
    quoted = f"the comment at {entry.name}: {value:g} says otherwise: `{quotation(entry)}`"
    if mine:
        wanted = mine[0]
        span = f"{wanted.low:g}" if wanted.low == wanted.high else f"{wanted.low:g} to {wanted.high:g}"
        return Finding(
            rule="lr_too_low" if value < wanted.low else "lr_too_high",
            severity="warning",
            where=where,
            value=value,
            limit=span,
            message=f"{quoted}; the optimizer is {optimizer}, for which it gives {span}",
            advice=f"set {entry.name} to {span}, or correct the comment",
        )
    others = [statement for statement in said if statement.low is None or statement.allows(value)]
    named = any(
        family(word) == optimizer for comment in entry.comments for word in re.findall(NAME, comment.text, re.I)
    )
    if others and not named and "muon" in (optimizer, others[0].family):
        return Finding(
            rule="muon_convention",
            severity="warning",
            where=where,
            value=value,
            message=f"{quoted}; it means the value for {others[0].family}, and the optimizer is {optimizer}",
            advice=f"give {optimizer} a learning rate of its own, or correct the comment",
        )
    return None


def quotation(entry: Entry) -> str:
    """The entry's line, and before it those comment lines above it that name an optimizer."""
    above = [f"# {c.text}" for c in entry.comments if c.line != entry.line and statements(c.text)]
    return " ".join(" / ".join([*above, entry.text.strip()]).split())
