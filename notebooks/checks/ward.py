"""The ward: twelve recorded runs without labels, measurements that cost minutes, and what a diagnosis is worth.

ward = open_ward(seed=0)
ward.order("run 3", "tokens")                   # shows what was measured; the minutes are written down
ward.diagnose("run 3", "random tokens", evidence="tokens", cure="mend the loader, and let it raise")
ward.score()
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from checks.checklist import LIST
from checks.ward_notes import go_on, keep
from checks.ward_plans import CAUSES, EXAMPLE, OTHER_CURES, Plan, draw
from moe_lab.config import ROOT, ConfigError
from moe_lab.sections import read_yaml, suggestion
from moe_lab.show.front import is_interactive

COMMITTED = ROOT / "notebooks" / "results" / "ward"
CHECKLIST = read_yaml(LIST)
LINES = {line["id"]: line for line in CHECKLIST["lines"]}
# measurement → [minutes, what is done]; the prices are the checklist's
PRICES: dict[str, list] = CHECKLIST["measurements"]
DEAREST = max(PRICES, key=lambda what: PRICES[what][0])


class Result(NamedTuple):
    """What a measurement gave: `lines` to read, `readings` by name, and the `rules` of its findings."""

    lines: Sequence[str]
    readings: Mapping[str, float]
    rules: Sequence[str]  # of findings of at least `warning`
    drawn: Any = None  # what its figure is made from


def sign_in(result: Result, line: Mapping[str, Any]) -> bool:
    """Whether a measurement shows what a line of the checklist looks for."""
    for sign in line["see"]:
        value = result.readings.get(sign.get("reading"))
        if sign.get("finding") in result.rules:
            return True
        if value is not None and (
            "above" in sign and value > sign["above"] or "below" in sign and value < sign["below"]
        ):
            return True
    return False


def shows(result: Result, cause: str) -> bool:
    return any(sign_in(result, LINES[id]) for id in CAUSES[cause].lines)


class Patient:
    """One recorded run. Its training loss and its config file are free to look at; the rest is ordered."""

    def __init__(self, name: str, path: Path):
        if not path.exists():
            raise ConfigError(f"{path}: no such run; make the ward with `make ward SEED=…`")
        held = json.loads(path.read_text(encoding="utf-8"))
        self.name, self.config, self.record, self.origin = name, held["config"], held["record"], held["origin"]
        self.results = {what: Result(**found) for what, found in held["measured"].items()}


class Note(NamedTuple):
    """What a learner wrote down about a run."""

    causes: frozenset[str]
    evidence: tuple[str, ...]
    cures: frozenset[str]


class Mark(NamedTuple):
    """What a note is worth."""

    right: bool
    points: float  # 0 to 10
    par: int  # minutes of the shortest way
    why: str


@dataclass
class Ward:
    """The runs, what was ordered of them and what was written down. `plans` is what the notes are held against."""

    plans: Mapping[str, Plan]
    patients: dict[str, Patient]
    ordered: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    kept: Path | None = None  # where both are kept, for a person

    def look(self, run: str, what: str) -> Result:
        """Order a measurement without showing it. Asked again, it costs nothing."""
        patient, what = self.patients[named(run, self.patients, "run")], named(what, PRICES, "measurement")
        orders = self.ordered.setdefault(patient.name, [])
        if what not in orders:
            orders.append(what)
            keep(self)
        return patient.results[what]

    def order(self, run: str, what: str) -> None:
        """Order a measurement of a run: what it says, and its figure where it has one."""
        from checks.figures_10 import show_result  # a reader by script needs no figures

        paid = what in self.ordered.get(run, ())
        result = self.look(run, what)
        price = "paid already" if paid else f"{PRICES[what][0]} min"
        print(f"{run}, {what}: {price}, {self.minutes(run)} min on this run so far")
        for line in result.lines:
            print(textwrap.fill(line, 102, initial_indent="  ", subsequent_indent="    "))
        show_result(run, what, result)

    def config(self, run: str) -> None:
        """Print the file that a run was started with, as its author left it. It is free."""
        print(self.patients[named(run, self.patients, "run")].config)

    def minutes(self, run: str | None = None) -> int:
        """Spent on one run, or on all of them."""
        runs = self.ordered if run is None else [run]
        return sum(PRICES[what][0] for name in runs for what in self.ordered.get(name, ()))

    def diagnose(
        self, run: str, causes: str | Iterable[str], evidence: str | Iterable[str], cure: str | Iterable[str]
    ) -> None:
        """Write down what a run has: one cause or two, the measurements that show it, and a cure for each cause."""
        run = named(run, self.patients, "run")
        found, shown, cures = ([x] if isinstance(x, str) else list(x) for x in (causes, evidence, cure))
        found = frozenset(named(cause, CAUSES, "cause") for cause in found)
        shown = tuple(named(what, PRICES, "measurement") for what in shown)
        cures = frozenset(named(text, all_cures(), "cure") for text in cures)
        if not found:
            raise ConfigError(f"{run}: name a cause; healthy is one")
        if missing := [what for what in shown if what not in self.ordered.get(run, ())]:
            raise ConfigError(f"{run}: {missing[0]} was not ordered, so it is no evidence yet")
        self.notes[run] = Note(found, shown, cures)
        keep(self)
        lacks = [] if shown or found == {"healthy"} else ["no evidence yet"]
        lacks += [] if cures else ["no cure yet"]
        print("; ".join([f"{run}: {', '.join(sorted(found))}", f"{self.minutes(run)} minutes", *lacks]))

    def marks(self) -> dict[str, Mark]:
        """Of every run with a note, in the order of the runs."""
        return {run: mark(self, run) for run in self.patients if run in self.notes}

    def score(self) -> None:
        """Print, for every run with a diagnosis, what was right, and what would have been the shortest way."""
        marks = self.marks()
        if not marks:
            print("nothing is written down yet: use the desk above, or ward.diagnose(run, causes, evidence, cure)")
            return
        for run, one in marks.items():
            print(
                textwrap.fill(
                    f"{'✓' if one.right else '✗'} {run}: {one.points:g} points. {one.why}", 98, subsequent_indent="  "
                )
            )
        right, points = sum(one.right for one in marks.values()), sum(one.points for one in marks.values())
        spent, par = sum(map(self.minutes, marks)), sum(one.par for one in marks.values())
        print(
            f"{right} of {len(marks)} right; {points:g} of {10 * len(marks)} points; "
            f"{spent} minutes, the shortest ways take {par}"
        )


def all_cures() -> list[str]:
    return [*(cause.cure for cause in CAUSES.values()), *OTHER_CURES]


def shortest(patient: Patient, causes: Iterable[str]) -> list[str]:
    """The cheapest measurements that show all causes in this very run; of a healthy one, all but the dearest."""
    if set(causes) == {"healthy"}:
        return [what for what in PRICES if what != DEAREST]
    ways = {}
    for cause in causes:
        able = [what for what, found in patient.results.items() if shows(found, cause)]
        ways |= dict.fromkeys(sorted(able, key=lambda what: PRICES[what][0])[:1])
    return list(ways)


def seen_by(result: Result, causes: Iterable[str]) -> str:
    """The lines of the checklist whose sign a measurement shows, of those that name one of the causes."""
    ids = [id for cause in sorted(causes) for id in CAUSES[cause].lines if sign_in(result, LINES[id])]
    return ", and ".join(f"{id}: {LINES[id]['sign']}" for id in ids)


def mark(ward: Ward, run: str) -> Mark:
    """Ten points for the right causes, less a quarter of a point for each minute beyond the shortest way, but at least
    five of them; one less for evidence, and one less for a cure, that does not fit. Three where one of two causes was named and
    nothing false."""
    note, truth, patient = ward.notes[run], ward.plans[run].causes, ward.patients[run]
    way = shortest(patient, sorted(truth))
    par, spent, answer = sum(PRICES[what][0] for what in way), ward.minutes(run), " and ".join(sorted(truth))
    if note.causes != truth:
        half = bool(note.causes) and note.causes < truth
        signs = "; ".join(
            f"{what} ({PRICES[what][0]} min) shows {seen_by(patient.results[what], truth)}" for what in way
        )
        shown = "nothing that was measured is out of order" if truth == {"healthy"} else signs
        return Mark(False, 3.0 * half, par, f"{'One of two' if half else 'No'}: {answer}. {shown}")
    points, remarks = 10 - min(5, max(0, spent - par) / 4), []
    seen = [patient.results[what] for what in note.evidence]
    if truth != {"healthy"} and not all(any(shows(result, cause) for result in seen) for cause in truth):
        points, remarks = points - 1, [f"The evidence is in: {', '.join(way)}."]
    if note.cures != (cures := {CAUSES[cause].cure for cause in truth}):
        points, remarks = points - 1, [*remarks, f"The cure: {'; '.join(sorted(cures))}."]
    if spent > par:
        remarks.append(f"{spent} minutes, and {par} would do: {', '.join(way)}.")
    return Mark(True, points, par, " ".join([f"{answer.capitalize()}.", *remarks]))


def open_ward(seed: int = 0, kept: bool = True) -> Ward:
    """The ward of a seed: a committed one, or one that `make ward SEED=…` has made here. Where a person sits, what was ordered
    and written down is taken up, and `kept`. Raises ConfigError."""
    ward = admit(draw(seed), folder_of(seed))
    if kept and is_interactive():
        go_on(ward, str(seed))
    return ward


def open_example() -> Ward:
    """The labelled run of notebook 10 and its control."""
    return admit(EXAMPLE, COMMITTED)


def admit(plans: Mapping[str, Plan], folder: Path) -> Ward:
    return Ward(plans, {name: Patient(name, folder / file_of(name)) for name in plans})


def file_of(run: str) -> str:
    return f"{run.replace(' ', '_')}.json"


def folder_of(seed: int) -> Path:
    """Where a ward lies: the committed ones with the results, others under runs/."""
    committed = COMMITTED / str(seed)
    return committed if seed in (0, 1) else ROOT / "runs" / "ward" / str(seed)


def named(text: str, known: Iterable[str], what: str) -> str:
    """`text` if it is known, else a ConfigError with the nearest one."""
    known = list(known)
    if text not in known:
        near = suggestion(str(text), known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"{text!r} is no {what} of the ward{near}")
    return text
