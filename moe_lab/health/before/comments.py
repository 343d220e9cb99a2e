"""Comments that contradict the learning rate they stand beside: "use 0.001 for Muon" next to 0.0003 under Muon."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from ..findings import Finding
from .plan import FAMILIES, Plan, family

NUMBER = r"(?<![\w.])(?P<{}>\d+(?:\.\d*)?(?:e[+-]?\d+)?)(?![\w.]*\w)"  # to be named
TO = r"\s*(?:-|–|to|and|…|\.\.\.?)\s*"
NOT_A_RATE = rf"(?!\s*(?:[x×%]|times\b|steps?\b|{TO}\d))"  # "Muon takes 3–10 × the LR" names no value
RANGE = rf"{NUMBER.format('low')}(?:{TO}{NUMBER.format('high')})?{NOT_A_RATE}"
NAME = rf"\b(?P<name>(?:{'|'.join(FAMILIES)})\w*)"
FOR = r"\s*[(#,]?\s*(?:is\s+)?(?:for|with|under|in case of|if|when using)\s+(?:the\s+)?"
SAYS = r"(?::|=|->|→|,|uses?|wants?|needs?|likes?|takes?|at|is|should be|lr|\s)*"
# a value for a name, or a name and its value: what one has matched is not asked of the other
FORMS = [re.compile(form, re.I) for form in (RANGE + FOR + NAME, NAME + SAYS + RANGE)]
NEGATED = re.compile(r"(?:\b(?:not|never|no|than|unlike|was|were|instead of|too \w+)|n't)\W+(?:\w+\W+){0,2}$", re.I)
SAYS_OFF, SAYS_ON = (
    re.compile(rf"(?:is |now |was )?(?:{word})\b(?! (?:by default|for|in|if|when|unless|at|until))", re.I)
    for word in ("disabled|off|deactivated", "enabled|on|activated")
)


def switches(plan: Plan) -> Iterator[Finding]:
    """A warning for each true or false whose comment beside it begins by saying the opposite."""
    said = dict.fromkeys(("true", "yes", "on"), SAYS_OFF) | dict.fromkeys(("false", "no", "off"), SAYS_ON)
    for entry in plan.entries:
        value, beside = str(entry.value).lower(), (entry.comments or ("",))[-1].strip()
        if value in said and beside in entry.line and said[value].match(beside):
            line = " ".join(entry.line.split())
            message = f"{entry.name} is {value} and the comment beside it says otherwise: `{line}`"
            advice = "find out which of the two is meant, and correct the other"
            yield Finding("comment_contradicts", "warning", entry.where, message, advice, value, beside)


class Statement(NamedTuple):
    """What a comment says about a value: from `low` to `high` for an optimizer."""

    family: str
    low: float
    high: float


def statements(comment: str) -> list[Statement]:
    """Every "X for NAME" and "NAME: X" of a comment, where NAME is an optimizer and nothing negates it; a number over 1 is a count."""
    stated = []

    def note(match: re.Match) -> str:
        ends = sorted(float(match[end]) for end in ("low", "high") if match[end])
        if ends[-1] <= 1 and not NEGATED.search(match.string[: match.start()]):
            stated.append(Statement(family(match["name"]), ends[0], ends[-1]))
        return "|" * len(match[0])

    for form in FORMS:
        comment = form.sub(note, comment)
    return stated


def contradictions(plan: Plan) -> Iterator[Finding]:
    """A warning for each learning rate for whose optimizer the comments beside or above it give others, and not this one."""
    for entry, value, optimizer in plan.peak_rates():
        stated = [s for comment in entry.comments for s in statements(comment) if s.family == optimizer]
        if not stated or any(s.low * (1 - 1e-6) <= value <= s.high * (1 + 1e-6) for s in stated):
            continue
        _, low, high = stated[0]
        span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        above = [f"# {c}" for c in entry.comments if c not in entry.line and statements(c)]
        line = " ".join(" / ".join([*above, entry.line]).split())
        message = f"the comment at {entry.name}: {value:g} says otherwise: `{line}`; the optimizer is {optimizer}, for which it gives {span}"
        advice = f"set {entry.name} to {span}, or correct the comment"
        yield Finding(
            "lr_too_low" if value < low else "lr_too_high", "warning", entry.where, message, advice, value, span
        )
