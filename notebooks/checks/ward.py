"""The ward: twelve recorded runs without labels, measurements that cost minutes, and what a diagnosis is worth.

    ward = open_ward(seed=0)
    ward.order("run 3", "data")                     # prints what was measured; the minutes are written down
    ward.diagnose("run 3", ["random tokens"], evidence="data", cure="repair the data path, and let it fail loudly")
    ward.score()

What is wrong with a run is not written down anywhere: it is drawn from the seed, here and by `make ward`, which makes the
runs. A reader who wants to know before measuring can find out; nobody finds out by accident.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_lab.config import ROOT, ConfigError
from moe_lab.sections import suggestion

N_RUNS = 12
COMMITTED = ROOT / "notebooks" / "results" / "ward"

# measurement → minutes that it costs on a real run, and what it does
PRICES: dict[str, tuple[int, str]] = {
    "floors": (1, "training and validation loss beside the tables of counts"),
    "preflight": (1, "the config file, read before a second of compute"),
    "experts": (1, "the load of every expert, from the record"),
    "data": (2, "the batches that the run was fed"),
    "inspect": (3, "its last checkpoint against its own start"),
    "modes": (4, "the same tokens in training and in evaluation mode"),
    "causality": (4, "later tokens changed, earlier logits compared"),
    "watch": (8, "the run once more, under a watch"),
    "probe": (15, "thirty updates from its last state, each learning rate × 3"),
}

# cause → (a cure, the measurements that can show it, the cheapest first)
CAUSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "healthy": ("leave it as it is", ("watch",)),
    "random tokens": ("repair the data path, and let it fail loudly", ("data",)),
    "padding in the loss": ("mask the padding out of the targets", ("data",)),
    "sees the future": ("let no operation read a later token", ("causality",)),
    "training and evaluation differ": ("run the same network in both modes", ("modes",)),
    "updates rounded away": ("float32 parameters, bf16 for compute only", ("inspect", "watch")),
    "learning rate too low": ("raise the learning rate", ("preflight", "watch", "probe")),
    "learning rate too high": ("lower the learning rate", ("preflight", "watch")),
    "cut off from the gradient": ("connect the branch to the loss again", ("watch",)),
    "in no optimizer": ("give the tensors to an optimizer", ("inspect", "watch")),
    "experts collapsed": ("balance the experts", ("experts",)),
    "loss off by a factor": ("divide the loss by the accumulation once", ("floors", "watch")),
}
# cures that are often proposed and repair none of these
OTHER_CURES = ("switch MoD and Mamba off", "train longer", "start again with another seed", "clip gradients harder")

# what is planted for each cause: its variants, of which a seed draws one
VARIANTS: dict[str, tuple[str, ...]] = {
    "healthy": ("as configured", "long warm-up", "AdamW alone", "the other convention"),
    "random tokens": ("uniform",),
    "padding in the loss": ("half", "most"),
    "sees the future": ("convolution", "attention", "unsorted"),
    "training and evaluation differ": ("depth off", "untrained predictor"),
    "updates rounded away": ("by the code", "by the config"),
    "learning rate too low": ("of AdamW", "a tenth"),
    "learning rate too high": ("20 ×",),
    "cut off from the gradient": ("feed-forward", "values", "depth router"),
    "in no optimizer": ("vectors", "matrices"),
    "experts collapsed": ("wrong sign",),
    "loss off by a factor": ("halved",),
}
ALWAYS = (
    *("healthy", "healthy", "random tokens", "sees the future", "experts collapsed", "updates rounded away"),
    *("learning rate too low", "cut off from the gradient", "training and evaluation differ"),
)
ONE_OF = ("padding in the loss", "learning rate too high", "in no optimizer", "loss off by a factor")
PAIRS = (
    ("learning rate too low", "updates rounded away"),
    ("experts collapsed", "cut off from the gradient"),
    ("padding in the loss", "learning rate too low"),
    ("training and evaluation differ", "in no optimizer"),
    ("random tokens", "updates rounded away"),
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
    key = hashlib.blake2b(str(seed).encode(), key=b"ward", digest_size=16).digest()
    choose = random.Random(key)
    causes = [*((cause,) for cause in (*ALWAYS, choose.choice(ONE_OF))), *choose.sample(PAIRS, 2)]
    choose.shuffle(causes)
    left = {cause: choose.sample(kinds, len(kinds)) for cause, kinds in VARIANTS.items()}
    plans = {}
    for number, combined in enumerate(causes, 1):
        faults = []
        for cause in combined:
            kinds = left[cause]
            faults.append((cause, kinds[0]))
            left[cause] = [*kinds[1:], kinds[0]]  # the next one of the same cause is another variant
        plans[f"run {number}"] = Plan(tuple(faults), choose.randrange(2**31))
    return plans


class Result(NamedTuple):
    """What a measurement gave: `lines` to read, `readings` by name, and the `rules` of its findings."""

    lines: Sequence[str]
    readings: Mapping[str, float]
    rules: Sequence[str]  # of findings of at least `warning`
    drawn: Any = None  # what a figure of it is made from


class Patient:
    """One recorded run: the rows of its record and its config file are free to read, the rest is ordered."""

    def __init__(self, name: str, path: Path):
        held = json.loads(path.read_text(encoding="utf-8"))
        self.name, self.config, self.record = name, held["config"], held["record"]
        self.floors, self.origin, self._measured = held["floors"], held["origin"], held["measured"]

    def measured(self, what: str) -> Result:
        return Result(**self._measured[what])


@dataclass
class Note:
    """What a learner wrote down about a run."""

    causes: frozenset[str]
    evidence: tuple[str, ...]
    cure: tuple[str, ...]


@dataclass
class Ward:
    """The runs, what was ordered of them and what was written down."""

    seed: int
    patients: dict[str, Patient]
    ordered: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)

    def look(self, run: str, what: str) -> Result:
        """Order a measurement without printing it. Asked again, it costs nothing."""
        patient, what = self.patients[named(run, self.patients, "run")], named(what, PRICES, "measurement")
        orders = self.ordered.setdefault(patient.name, [])
        if what not in orders:
            orders.append(what)
        return patient.measured(what)

    def order(self, run: str, what: str) -> None:
        """Order a measurement of a run: what it says, and its figure where it has one."""
        from checks.figures_10 import show_result  # the figures need matplotlib; a reader by script does not

        run = named(run, self.patients, "run")
        result, price = self.look(run, what), PRICES[what][0]
        print(f"{run}, {what} ({price} min; {self.minutes(run)} min so far on this run)")
        print(*(f"  {line}" for line in result.lines), sep="\n")
        show_result(self.patients[run], what, result)

    def minutes(self, run: str | None = None) -> int:
        """Spent on one run, or on all of them."""
        runs = self.ordered if run is None else [run]
        return sum(PRICES[what][0] for name in runs for what in self.ordered.get(name, ()))

    def diagnose(
        self, run: str, causes: str | Iterable[str], evidence: str | Iterable[str], cure: str | Iterable[str]
    ) -> None:
        """Write down what a run has: one cause or two, the measurements that show it, and a cure for each cause."""
        run = named(run, self.patients, "run")
        found, shown, cures = (tuple([x] if isinstance(x, str) else x) for x in (causes, evidence, cure))
        found = frozenset(named(cause, CAUSES, "cause") for cause in found)
        shown = tuple(named(what, PRICES, "measurement") for what in shown)
        known = [*(cures_of for cures_of, _ in CAUSES.values()), *OTHER_CURES]
        cures = tuple(named(text, known, "cure") for text in cures)
        if missing := [what for what in shown if what not in self.ordered.get(run, ())]:
            raise ConfigError(f"{run}: {missing[0]} was not ordered, so it is no evidence yet")
        self.notes[run] = Note(found, shown, cures)
        print(f"{run}: {', '.join(sorted(found))}; {self.minutes(run)} minutes")

    def score(self) -> None:
        """Print, for every run that has a diagnosis, what was right and what would have been the shortest way."""
        if not self.notes:
            print("no diagnosis has been written down yet: ward.diagnose(run, causes, evidence, cure)")
            return
        marks = {run: mark(self, run) for run in self.patients if run in self.notes}
        for run, one in marks.items():
            print(f"{'✓' if one.right else '✗'} {run}: {one.points:.1f} points. {one.why}")
        right, points = sum(one.right for one in marks.values()), sum(one.points for one in marks.values())
        shortest = sum(one.par for one in marks.values())
        print(
            f"{right} of {len(marks)} right, {points:.0f} of {10 * len(marks)} points, {self.minutes()} minutes;",
            end=" ",
        )
        print(f"the shortest ways to these answers take {shortest}")


class Mark(NamedTuple):
    right: bool
    points: float  # 0 to 10
    par: int  # minutes of the shortest way
    why: str


# To call a run healthy takes one look at everything that costs less than a probe.
ROUND = tuple(what for what in PRICES if what not in ("probe", "inspect"))


def shortest(ward: Ward, run: str, causes: Iterable[str]) -> tuple[str, ...]:
    """The cheapest measurements that show all causes in this very run, by what the checklist calls a sign."""
    if set(causes) == {"healthy"}:
        return ROUND
    from checks.ward_readers import shows

    patient, ways = ward.patients[run], []
    for cause in causes:
        able = [what for what in CAUSES[cause][1] if shows(patient.measured(what), what, cause)]
        ways += (able or CAUSES[cause][1])[:1]
    return tuple(dict.fromkeys(ways))


def mark(ward: Ward, run: str) -> Mark:
    """Ten points for the right causes, less a quarter of a point for each minute beyond the shortest way, but at least
    five; one less for evidence or a cure that does not fit. Three for one of two causes and nothing false beside it."""
    note, truth = ward.notes[run], draw(ward.seed)[run].causes
    way = shortest(ward, run, sorted(truth))
    par, spent = sum(PRICES[what][0] for what in way), ward.minutes(run)
    shown = ", ".join(f"{what} ({PRICES[what][0]} min)" for what in way)
    answer = " and ".join(sorted(truth))
    if note.causes != truth:
        half = bool(note.causes) and note.causes < truth
        said = f"That is one of two: {answer}." if half else f"It was: {answer}."
        signs = "; ".join(line for what in way for line in ward.patients[run].measured(what).lines[:2])
        return Mark(False, 3.0 if half else 0.0, par, f"{said} What shows it: {shown}: {signs}")
    points, remarks = 10 - min(5, max(0, spent - par) / 4), []
    if truth != {"healthy"} and not set(note.evidence) & {what for c in truth for what in CAUSES[c][1]}:
        points, remarks = points - 1, [*remarks, f"the evidence is {shown}"]
    wanted = {CAUSES[cause][0] for cause in truth}
    if set(note.cure) != wanted:
        points, remarks = points - 1, [*remarks, f"the cure is to {' and to '.join(sorted(wanted))}"]
    if spent > par:
        remarks.append(f"{spent} minutes; {par} do: {shown}")
    return Mark(True, points, par, f"{answer}. {'; '.join(remarks)}".rstrip(". ") + ".")


def open_ward(seed: int = 0, folder: Path | None = None) -> Ward:
    """The ward of a seed: a committed one, or one that `make ward SEED=…` has made here. Raises ConfigError."""
    folder = folder or folder_of(seed)
    paths = {name: folder / f"{name.replace(' ', '_')}.json" for name in (f"run {n}" for n in range(1, N_RUNS + 1))}
    if absent := [path for path in paths.values() if not path.exists()]:
        raise ConfigError(f"{absent[0]}: no such run; make the ward: make ward SEED={seed}")
    return Ward(seed, {name: Patient(name, path) for name, path in paths.items()})


def folder_of(seed: int) -> Path:
    """Where a ward lies: the committed ones with the results, others under runs/."""
    committed = COMMITTED / str(seed)
    return committed if committed.exists() else ROOT / "runs" / "ward" / str(seed)


def named(text: str, known: Iterable[str], what: str) -> str:
    """`text` if it is known, else a ConfigError with the nearest one."""
    known = list(known)
    if text not in known:
        near = suggestion(str(text), known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"{text!r} is no {what} of the ward{near}")
    return text
