"""What notebook 00 says about a machine."""

import time
from importlib import metadata

from moe_lab.course import machine
from moe_lab.train import Trainer

MEASURED = {
    "reference": {"machine": "two cores", "tokens_per_s": {"smoke": 20_000, "lab": None}},
    "notebooks": {"01_a": {"smoke": 0.5, "lab": 3.0}, "02_b": {"smoke": None, "lab": 2.0}},
}


def test_minutes_scale_with_the_speed_and_the_unmeasured_stays_unknown() -> None:
    assert machine.estimated_minutes(MEASURED, "smoke", 10_000) == {"01_a": 1.0, "02_b": None}
    assert machine.estimated_minutes(MEASURED, "lab", 10_000) == {"01_a": None, "02_b": None}
    assert machine.estimated_minutes(MEASURED, "gpu", 10_000) == {"01_a": None, "02_b": None}


def test_the_file_of_minutes_has_the_form_that_the_estimate_reads() -> None:
    measured = machine.read_minutes()
    assert set(measured["reference"]) == {"machine", "tokens_per_s"}
    assert set(machine.estimated_minutes(measured, "lab", 1.0)) == set(measured["notebooks"])


def test_speed_counts_tokens_of_whole_steps_without_the_first(run, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    update = Trainer.update

    def timed(trainer: Trainer) -> object:
        report = update(trainer)
        now[0] += 100 if trainer.step == 1 else 2  # the first one warms up
        return report

    monkeypatch.setattr(Trainer, "update", timed)
    assert machine.tokens_per_second(run.config, n_steps=3) == run.config.tokens_per_step / 2


def test_unmet_requirements_are_named(monkeypatch) -> None:
    required = ["pytest<10", "no-such-package-at-all>=2", 'pytest>=999; extra == "lab"']  # the first is met
    required += ['pytest>=999; extra == "other"', 'pytest>=999; python_version < "3"']  # these are not asked for
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    missing, version = "no-such-package-at-all>=2 is missing", metadata.version("pytest")
    assert machine.unmet_requirements() == [missing, f"pytest>=999, found {version}"]
    assert machine.unmet_requirements("none") == [missing]
