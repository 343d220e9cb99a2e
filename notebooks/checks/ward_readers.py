"""Two readers of a ward by script: one follows the printed checklist and nothing else, one looks at training curves alone.

They say what the exam is worth: the checklist is enough for it, and the curve is not.
"""

from __future__ import annotations

import math
import re

import yaml

from checks.ward import CAUSES, DEAREST, LINES, PRICES, Patient, Ward, sign_in

OFFERED = {
    id: cause for cause, (_, ids, _) in CAUSES.items() for id in ids
}  # line of the checklist → an answer of the ward


def leads_to(line: dict) -> list[str]:
    """The lines that a line's cause or cure sends its reader to: then it names a suspicion and no cause."""
    first_last = [(a, b or a) for a, b in re.findall(r"\b(K\d\d)(?: to (K\d\d))?", f"{line['cause']} {line['cure']}")]
    return [id for first, last in first_last for id in LINES if first <= id <= last]


def by_checklist(ward: Ward, run: str) -> frozenset[str]:
    """Goes down the lines. Every look is ordered when its first line is reached, the dearest one only where another line
    sends there. The runs are over, so nothing can be mended in between: all lines are read."""
    seen = {}
    sent = {DEAREST: False}
    for what in sorted(PRICES, key=lambda what: PRICES[what][0]):
        if sent.get(what, True):
            seen[what] = ward.look(run, what)
        fired = [line for line in LINES.values() if any(sign_in(result, line) for result in seen.values())]
        led = [LINES[id]["measurement"] for line in fired for id in leads_to(line)]
        sent[DEAREST] = DEAREST in led
    named = {OFFERED[line["id"]] for line in fired if not leads_to(line) and line["id"] in OFFERED}
    return frozenset(named - {"healthy"}) or frozenset({"healthy"})


def by_curve(patient: Patient) -> frozenset[str]:
    """What a training curve alone tempts to say. The vocabulary, and with it ln V, is in the config, which is free."""
    losses = patient.record["loss"]
    uniform = math.log(yaml.safe_load(patient.config)["model"]["vocab_size"])
    first, last = losses[0], sum(losses[-5:]) / 5
    if abs(first - uniform) > 0.5:
        return frozenset({"shown loss off by a factor"})
    if last > 1.2 * first:
        return frozenset({"learning rate too high"})
    if abs(last - uniform) < 0.05:
        return frozenset({"random tokens"})
    return frozenset({"learning rate too low" if first - last < 1 else "healthy"})


def judged(ward: Ward, reader: str) -> tuple[int, int]:
    """How many runs of a ward the `checklist` or the `curve` names right, all causes and none besides, and in how many minutes."""
    if reader == "checklist":
        said = {run: by_checklist(ward, run) for run in ward.patients}
    else:
        said = {run: by_curve(patient) for run, patient in ward.patients.items()}
    return sum(said[run] == ward.plans[run].causes for run in said), ward.minutes()


def studied(ward: Ward, labelled: Ward) -> int:
    """How many runs are named right by who was shown the curves of another ward with their labels, and takes the nearest's."""

    def apart(one: Patient, other: Patient) -> float:
        return sum(abs(a - b) for a, b in zip(one.record["loss"], other.record["loss"], strict=True))

    said = {}
    for run, patient in ward.patients.items():
        near = min(labelled.patients, key=lambda other: apart(patient, labelled.patients[other]))
        said[run] = labelled.plans[near].causes
    return sum(said[run] == ward.plans[run].causes for run in said)
