"""What a learning rate means: how far it moves an element, in which convention, and what such models are trained with.

A matrix is (A, B): A outputs, B inputs (fan-in). Learning rates are peak values, after warm-up.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import geometric_mean, linear_regression
from typing import NamedTuple

from .findings import Finding, grouped

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
# How far, as a factor, a measured step may be from a convention's and still be of it: Newton–Schulz leaves 0.7 to 1.2.
SAME = 1.5
RAISE = "raise it unless this is fine-tuning; three short runs a factor of 3 apart show where the loss falls fastest"
LOWER = "lower it, or watch the first updates closely: the loss may blow up"


class Group(NamedTuple):
    """Parameters that share a learning rate."""

    name: str
    kind: str  # "muon" or "adam" (Adam, AdamW, what steps like them)
    lr: float
    shape: Sequence[int] = (1, 1)  # of a typical matrix, (…, A, B); only Muon's matters
    convention: str = "original"  # only Muon's matters; one of its own has a measured step
    rms: float | None = None  # RMS of a step over the LR, measured where no convention tells it

    @property
    def limit(self) -> float:
        return HIGH.get(self.kind) or HIGH.get(self.convention, HIGH["original"])

    @property
    def adamw_lr(self) -> float:
        """The AdamW LR that moves an element as far."""
        if self.rms is not None:
            return self.lr * self.rms / ADAMW_RMS
        return adamw_equivalent(self.lr, self.shape, self.convention) if self.kind == "muon" else self.lr

    @property
    def described(self) -> str:
        """`muon 0.0003 (original: like AdamW at 3.8e-05)`."""
        how = f"{self.convention}: " if self.kind == "muon" else ""
        like = f" ({how}like AdamW at {self.adamw_lr:.2g})" if self.adamw_lr != self.lr else ""
        return f"{self.name} {self.lr:.3g}{like}"


def convention_of(steps: Sequence[tuple[Sequence[int], float]], declared: str | None = None) -> str | None:
    """The convention of measured orthogonal steps, each a shape (…, A, B) and an RMS over the LR; None for another one.

    In matrices of 25 inputs both say the same: there what the optimizer declares counts, if it fits.
    """
    off = {c: max(distance(rms / muon_element_step(1.0, shape, c)) for shape, rms in steps) for c in CONVENTIONS}
    best = declared if off.get(declared, math.inf) < SAME else min(off, key=off.__getitem__)
    return best if off[best] < SAME else None


def muon_element_step(lr: float, shape: Sequence[int], convention: str) -> float:
    """RMS by which one Muon update moves an element of a matrix (…, A, B), as if its singular values were all 1.

    Such an update has RMS 1 / sqrt(max(A, B)). `original` (Jordan 2024, https://kellerjordan.github.io/posts/muon/) scales
    it by lr · sqrt(max(1, A / B)), which comes to lr / sqrt(B); `match_rms_adamw` (Liu et al. 2025, eq. 4,
    https://arxiv.org/abs/2502.16982) by 0.2 · lr · sqrt(max(A, B)), which comes to 0.2 · lr for every shape.
    Raises ValueError for another convention.
    """
    rows, columns = shape[-2:]
    scales = (math.sqrt(max(1, rows / columns)), ADAMW_RMS * math.sqrt(max(rows, columns)))
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is not one of {', '.join(CONVENTIONS)}")
    return lr * scales[CONVENTIONS.index(convention)] / math.sqrt(max(rows, columns))


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
    slope, start = linear_regression(*([math.log(value) for value in axis] for axis in zip(*GPT3, strict=True)))
    return math.exp(start + slope * math.log(max(n_parameters, SMALLEST)))


def distance(ratio: float) -> float:
    """By which factor an LR is off, up or down: at least 1."""
    return max(ratio, 1 / ratio)


def compared_with(n_parameters: float, usual: float) -> str:
    """The table's word for this size: a fact within it, and said to be a continuation beyond."""
    first, last = GPT3[0][0], GPT3[-1][0]
    if first <= n_parameters <= last:
        return f"a transformer of {n_parameters:.2g} parameters usually starts at about {usual:.2g}"
    table = f"a table of {first:.3g} to {last:.3g}, continued, gives {usual:.2g}"
    return f"for a transformer of {n_parameters:.2g} parameters {table}"


def judge(groups: Iterable[Group], n_parameters: float) -> list[Finding]:
    """Hold peak LRs against what transformers of this size are trained with from scratch; findings are warnings.

    An LR counts as the AdamW LR that moves an element as far. Several groups of a kind are taken together, by
    geometric mean: embeddings beside Muon often get ten times what norms get. LRs of 0 are not judged.
    `muon_convention` if Muon alone is out of range and its number would fit in the other convention;
    otherwise `lr_too_low` and `lr_too_high` for the kinds that are out of range. Not for fine-tuning, whose LRs are lower.
    """
    usual = usual_adamw_lr(n_parameters)
    compared = compared_with(n_parameters, usual)

    def ratio_of(members: Iterable[Group]) -> float:
        return geometric_mean(group.adamw_lr for group in members) / usual

    kinds = grouped((group for group in groups if group.lr > 0), lambda group: group.kind)
    ratios = {kind: ratio_of(members) for kind, members in kinds.items()}
    muon, adam = kinds.get("muon", []), kinds.get("adam", [])
    low = [group for group in muon + adam if ratios[group.kind] < LOW]
    high = [group for group in muon + adam if ratios[group.kind] > group.limit]

    def finding(rule: str, out: Sequence[Group], says: str, advice: str, ratio: float, limit: float) -> Finding:
        where = ", ".join(group.name for group in out)
        described = ", ".join(group.described for group in out)
        message = f"learning rate {described} is {says}"
        return Finding(rule, "warning", where, message, advice, ratio, limit)

    findings, hint = [], ""
    if muon:
        name = CONVENTIONS[muon[0].convention != "match_rms_adamw"]
        other = [group._replace(convention=name, rms=None) for group in muon]
        ratio, mine = ratio_of(other), ratios["muon"]
        nearer = distance(mine) / distance(ratio)
        alone = {group.kind for group in low + high} == {"muon"}
        # in narrow matrices both conventions say nearly the same: then the number is at fault, not its convention
        if alone and LOW <= ratio <= other[0].limit and nearer >= 2:
            says = f"{mine:.2g} × the usual; {compared}. Read as {name} the same number is {ratio:.2g} × the usual: "
            says += "it seems meant for that, or for AdamW"
            advice = f"keep the number and set the convention to {name}, or keep {muon[0].convention} and try about "
            advice += f"{muon[0].lr * usual / muon[0].adamw_lr:.2g}"
            return [finding("muon_convention", muon, says, advice, mine, LOW if low else muon[0].limit)]
        if nearer > 1:
            hint = f". Read as {name}, Muon's would be {ratio:.2g} × the usual"
    for rule, out, advice in (("lr_too_low", low, RAISE), ("lr_too_high", high, LOWER)):
        if out:
            worst = max(out, key=lambda group: distance(ratios[group.kind]))
            ratio, limit = ratios[worst.kind], LOW if out is low else worst.limit
            says = f"up to {distance(ratio):.2g} times {'below' if out is low else 'above'} the usual; {compared}"
            findings.append(finding(rule, out, says + hint * (out[0].kind == "muon"), advice, ratio, limit))
    return findings
