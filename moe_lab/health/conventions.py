"""What a learning rate means: how far it moves an element, in which convention, and what such models are trained with.

Pure functions of numbers, for a config before training and for a run while it trains. A matrix is (A, B): A outputs,
B inputs (fan-in). Learning rates are peak values, after warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .findings import Finding

CONVENTIONS = ("original", "match_rms_adamw")
ADAMW_RMS = 0.2  # RMS of AdamW's update over its LR, as Liu et al. 2025 measured it: sec. 2.2, "Matching update RMS"

# Brown et al. 2020, table 2.1, https://arxiv.org/abs/2005.14165: parameters, peak LR of Adam
GPT3 = (
    *((125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4)),
    *((2.7e9, 1.6e-4), (6.7e9, 1.2e-4), (13e9, 1e-4), (175e9, 0.6e-4)),
)
SMALLEST = 1e6  # parameters; below, the power law is not followed any further

# How far from the usual LR a group may be, as a factor, before it is worth a warning.
LOW = 1 / 3
# Muon in `original` is run hot: published runs take up to 0.05 at width 768, 20 ×. `match_rms_adamw` is there so that AdamW's
# learning rates fit, and has AdamW's limit.
HIGH = {"adam": 12.0, "original": 30.0, "match_rms_adamw": 12.0}


class Group(NamedTuple):
    """Parameters that share a learning rate."""

    name: str
    kind: str  # "muon", "adam" (Adam, AdamW) or "other", which is not judged
    lr: float
    shape: Sequence[int] = (1, 1)  # of a typical matrix, (…, A, B); only Muon's matters
    convention: str = "original"  # only Muon's matters

    @property
    def scale(self) -> str:
        """What its number is held against: a key of HIGH."""
        return self.convention if self.kind == "muon" else self.kind


def muon_element_step(lr: float, shape: Sequence[int], convention: str) -> float:
    """RMS by which one Muon update moves an element of a matrix (…, A, B), as if its singular values were all 1.

    Such an update has RMS 1 / sqrt(max(A, B)). `original` (Jordan 2024, https://kellerjordan.github.io/posts/muon/) scales
    it by lr · sqrt(max(1, A / B)), which comes to lr / sqrt(B); `match_rms_adamw` (Liu et al. 2025, eq. 4,
    https://arxiv.org/abs/2502.16982) by 0.2 · lr · sqrt(max(A, B)), which comes to 0.2 · lr for every shape.
    Raises ValueError for another convention.
    """
    rows, columns = shape[-2:]
    orthogonal = 1 / math.sqrt(max(rows, columns))
    if convention == "original":
        return lr * math.sqrt(max(1.0, rows / columns)) * orthogonal
    if convention == "match_rms_adamw":
        return lr * ADAMW_RMS * math.sqrt(max(rows, columns)) * orthogonal
    raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}")


def adamw_equivalent(lr: float, shape: Sequence[int], convention: str) -> float:
    """The AdamW LR that moves an element of a matrix (…, A, B) as far as Muon does at `lr`: RMS over 0.2."""
    return muon_element_step(lr, shape, convention) / ADAMW_RMS


def lr_original_from_match(lr: float, shape: Sequence[int]) -> float:
    """The `original` number of the step that `lr` names in `match_rms_adamw`: 0.2 · sqrt(B) · lr, for every shape."""
    return lr / adamw_equivalent(1.0, shape, "original")


def usual_adamw_lr(n_parameters: float) -> float:
    """The AdamW LR that a transformer of this size is usually trained with from scratch.

    A power law through GPT-3's table, least squares in logs (the exponent is about -0.3). The table spans 125 million to 175
    billion parameters at batches of 0.5 to 3.2 million tokens; outside of it this is extrapolation, and below a million
    parameters the value of a million stands. Raises ValueError unless n_parameters > 0.
    """
    if not n_parameters > 0:
        raise ValueError(f"n_parameters={n_parameters} must be more than 0")
    points = [(math.log(size), math.log(lr)) for size, lr in GPT3]
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return math.exp(mean_y + slope * (math.log(max(n_parameters, SMALLEST)) - mean_x))


def adam_largest_step(betas: Sequence[float] = (0.9, 0.95)) -> float:
    """The most that one Adam update can move an element, over the LR, whatever the gradients: about 1.17 at 0.9, 0.95.

    By Cauchy–Schwarz |m| / sqrt(v) is at most (1 - b1) / sqrt((1 - b2) (1 - b1² / b2)); gradients that grow by a factor
    b2 / b1 a step reach it. Infinite if b1² ≥ b2. Bias correction only makes the first steps smaller.
    """
    first, second = betas
    if first**2 >= second:
        return math.inf
    return (1 - first) / math.sqrt((1 - second) * (1 - first**2 / second))


def level(scale: str, ratio: float) -> str:
    """`low`, `usual` or `high` for an LR over the usual one; `scale` is a key of HIGH."""
    return "low" if ratio < LOW else "high" if ratio > HIGH[scale] else "usual"


def distance(ratio: float) -> float:
    """By which factor an LR is off the usual one, up or down: at least 1."""
    return max(ratio, 1 / ratio)


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def judge(groups: Iterable[Group], n_parameters: float) -> list[Finding]:
    """Hold peak LRs against what transformers of this size are trained with from scratch; findings are warnings.

    Muon's LR counts as the AdamW LR that moves an element as far. Several groups of a kind are taken together, by
    geometric mean: embeddings beside Muon often get ten times what norms get. Groups of kind "other" and LRs of 0 are
    not judged. `muon_convention` if Muon alone is out of range and its number would fit in the other convention;
    otherwise `lr_too_low` and `lr_too_high` for the kinds that are out of range. Not for fine-tuning, whose LRs are lower.
    """
    usual = usual_adamw_lr(n_parameters)
    groups = [group for group in groups if group.lr > 0]
    muon = [group for group in groups if group.kind == "muon"]
    adam = [group for group in groups if group.kind == "adam"]
    ratios: dict[str, float] = {}  # of the kinds that there are: LR over the usual one
    if muon:
        ratios["muon"] = geometric_mean(adamw_equivalent(g.lr, g.shape, g.convention) for g in muon) / usual
    if adam:
        ratios["adam"] = geometric_mean(g.lr for g in adam) / usual
    if muon and level(muon[0].scale, ratios["muon"]) != "usual" and level("adam", ratios.get("adam", 1.0)) == "usual":
        other = geometric_mean(adamw_equivalent(g.lr, g.shape, other_convention(g.convention)) for g in muon) / usual
        # in narrow matrices both conventions say nearly the same: then the number is at fault, not its convention
        if level(other_convention(muon[0].convention), other) == "usual" and 2 * distance(other) <= distance(
            ratios["muon"]
        ):
            return [convention_finding(muon, ratios["muon"], other, n_parameters)]
    findings = []
    for rule, direction in (("lr_too_low", "low"), ("lr_too_high", "high")):
        out = [group for group in muon + adam if level(group.scale, ratios[group.kind]) == direction]
        if out:
            findings.append(
                range_finding(rule, out, [ratios[group.kind] for group in out], n_parameters, hint(out, ratios, usual))
            )
    return findings


def hint(groups: list[Group], ratios: dict[str, float], usual: float) -> str:
    """For a number of Muon's that is out of range in both conventions: how far in the other one, if that is nearer."""
    muon = [group for group in groups if group.kind == "muon"]
    if not muon:
        return ""
    other = other_convention(muon[0].convention)
    ratio = geometric_mean(adamw_equivalent(g.lr, g.shape, other) for g in muon) / usual
    return (
        f". Read as {other}, Muon's would be {ratio:.2g} × the usual"
        if distance(ratio) < distance(ratios["muon"])
        else ""
    )


def other_convention(convention: str) -> str:
    return CONVENTIONS[1 - CONVENTIONS.index(convention)]


def described(group: Group) -> str:
    """`muon 0.0003 (original: like AdamW at 3.8e-05)`."""
    if group.kind != "muon":
        return f"{group.name} {group.lr:.3g}"
    return (
        f"{group.name} {group.lr:.3g} ({group.convention}: like AdamW at "
        f"{adamw_equivalent(group.lr, group.shape, group.convention):.2g})"
    )


def compared(n_parameters: float) -> str:
    return f"a transformer of {n_parameters:.2g} parameters usually starts at about {usual_adamw_lr(n_parameters):.2g}"


def convention_finding(muon: list[Group], ratio: float, other_ratio: float, n_parameters: float) -> Finding:
    first, usual = muon[0], usual_adamw_lr(n_parameters)
    other = other_convention(first.convention)
    fitting = usual / adamw_equivalent(1.0, first.shape, first.convention)
    return Finding(
        rule="muon_convention",
        severity="warning",
        where=", ".join(group.name for group in muon),
        value=ratio,
        limit=LOW if ratio < LOW else HIGH[first.scale],
        message=f"learning rate {', '.join(map(described, muon))} is {ratio:.2g} × the usual; {compared(n_parameters)}. "
        f"Read as {other} the same number is {other_ratio:.2g} × the usual: it seems meant for that, or for AdamW",
        advice=f"keep the number and set the convention to {other}, or keep {first.convention} and try about {fitting:.2g}",
    )


def range_finding(rule: str, groups: list[Group], ratios: list[float], n_parameters: float, hint: str) -> Finding:
    low = rule == "lr_too_low"
    worst = min(ratios) if low else max(ratios)
    factor = f"{1 / worst:.2g} times below" if low else f"{worst:.2g} times above"
    return Finding(
        rule=rule,
        severity="warning",
        where=", ".join(group.name for group in groups),
        value=worst,
        limit=LOW if low else HIGH[groups[ratios.index(worst)].scale],
        message=f"learning rate {', '.join(map(described, groups))} is up to {factor} the usual; {compared(n_parameters)}"
        + hint,
        advice="raise it unless this is fine-tuning; three short runs a factor of 3 apart show where the loss falls fastest"
        if low
        else "lower it, or watch the first updates closely: the loss may blow up",
    )
