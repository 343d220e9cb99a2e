"""What a ward is drawn from: the causes that a run may have, how each is planted, and which run has which.

Drawn from the seed, here and by `make ward`, which makes the runs: it is written down nowhere else. A reader who wants to
know before measuring can find out; nobody finds out by accident.
"""

from __future__ import annotations

import hashlib
import random
from typing import NamedTuple


class Cause(NamedTuple):
    """Something that a run may have."""

    cure: str
    lines: tuple[str, ...]  # of the checklist, whose sign shows it
    variants: tuple[str, ...] = ()  # how it is planted; none: it is only offered as an answer


CAUSES: dict[str, Cause] = {
    "healthy": Cause("leave it as it is", ("K34",), ("as configured", "long warm-up", "AdamW alone", "the other convention")),
    "random tokens": Cause("mend the loader, and let it raise", ("K05",), ("uniform",)),
    "padding in the loss": Cause("mask the padding out of the targets", ("K06",), ("half", "most")),
    "batches that repeat": Cause("go through the whole text before any of it again", ("K07",), ("four",)),
    "labels shifted twice": Cause("shift the labels once", ("K19",), ("again",)),
    "shown loss off by a factor": Cause("divide by the accumulation once", ("K08",), ("halved",)),
    "sees the future": Cause("cut the path to later tokens", ("K09",), ("convolution", "attention", "unsorted")),
    "training and evaluation differ": Cause("one forward pass for both modes", ("K10",), ("depth off", "mixer off")),
    "residual added twice": Cause("add a sublayer's output to the chosen rows alone", ("K11",), ("skipped",)),
    "positions are ranks": Cause("hand the places of chosen tokens on", ("K12",), ("anew",)),
    "a block without memory": Cause("refuse to run without the real block", ("K13",), ("stand-in",)),
    "updates rounded away": Cause("float32 parameters, bf16 for compute", ("K01", "K14"), ("by the code", "by the config")),
    "position tables in 16 bits": Cause("keep tables in float32", ("K20",)),
    "special start values overwritten": Cause("initialise such a module last, by its own rule", ("K21",), ("zeros",)),
    "gradients cleared too early": Cause("clear gradients after the step, and nowhere else", ("K15",), ("early",)),
    "gradients clipped too hard": Cause("unscale before you clip, at a usual norm", ("K18",), ("clip",)),
    "learning rate too low": Cause("raise the learning rate", ("K28",), ("of AdamW", "a tenth")),
    "learning rate too high": Cause("lower the learning rate", ("K22",)),
    "learning rate spent early": Cause("let the schedule end with the run", ("K25",), ("third",)),
    "warm-up off by one": Cause("print the first three learning rates", ("K24",), ("first",)),
    "a schedule that does not fit": Cause("count warm-up, intervals and steps in updates", ("K04",), ("log",)),
    "cut off from the gradient": Cause("connect it to the loss again", ("K16",), ("feed-forward", "values", "depth router")),
    "in no optimizer": Cause("give the tensors to an optimizer", ("K17",), ("vectors", "matrices")),
    "experts collapsed": Cause("a balancing that acts", ("K23",), ("wrong sign",)),
    "steps count micro-batches": Cause("count updates", ("K32",)),
}  # fmt: skip
# cures that are often proposed and repair none of these
OTHER_CURES = ("switch MoD and Mamba off", "train longer", "another seed", "clip gradients harder")

ALWAYS = ("healthy", "healthy", "random tokens", "sees the future", "experts collapsed")
SOME = {  # how many are drawn → of these
    2: ("updates rounded away", "learning rate too low", "cut off from the gradient", "training and evaluation differ", "padding in the loss", "in no optimizer"),
    3: ("batches that repeat", "labels shifted twice", "residual added twice", "positions are ranks", "a block without memory", "special start values overwritten", "gradients cleared too early", "gradients clipped too hard", "learning rate spent early", "warm-up off by one", "a schedule that does not fit"),
}  # fmt: skip
PAIRS = (
    ("learning rate too low", "updates rounded away"),
    ("experts collapsed", "cut off from the gradient"),
    ("padding in the loss", "learning rate too low"),
    ("training and evaluation differ", "in no optimizer"),
    ("shown loss off by a factor", "cut off from the gradient"),
    ("batches that repeat", "a block without memory"),
    ("residual added twice", "special start values overwritten"),
    ("warm-up off by one", "in no optimizer"),
)


class Plan(NamedTuple):
    """What one run is made with."""

    faults: tuple[tuple[str, str], ...]  # (cause, variant) each; a healthy run has one that is none
    seed: int  # of its start values and data order

    @property
    def causes(self) -> frozenset[str]:
        return frozenset(cause for cause, _ in self.faults)


def draw(seed: int) -> dict[str, Plan]:
    """The twelve plans of a ward, by the name of the run."""
    choose = random.Random(hashlib.blake2b(str(seed).encode(), key=b"ward", digest_size=16).digest())
    single = [*ALWAYS, *(cause for n, known in SOME.items() for cause in choose.sample(known, n))]
    causes = [*((cause,) for cause in single), *choose.sample(PAIRS, 2)]
    choose.shuffle(causes)
    left = {name: choose.sample(cause.variants, len(cause.variants)) for name, cause in CAUSES.items()}
    plans = {}
    for number, combined in enumerate(causes, 1):
        faults = tuple((name, left[name][0]) for name in combined)
        for name in combined:
            left[name] = [*left[name][1:], left[name][0]]  # the next one of the same cause is another variant
        plans[f"run {number}"] = Plan(faults, choose.randrange(2**31))
    return plans


# seen before the exam, with their labels: the example and its control, which differ in nothing else
EXAMPLE = {
    "the example": Plan((("in no optimizer", "embeddings and heads"),), 10),
    "its control": Plan((("healthy", "as configured"),), 10),
}
