"""What notebook 00 says about a machine."""

import subprocess
import sys
import time
import timeit
from importlib import metadata

import pytest
import torch
from checks import machine_00

from moe_lab.config import Config
from moe_lab.train import Trainer, device

MEASURED = {
    "reference": {"machine": "two cores", "tokens_per_s": {"smoke": 20_000, "lab": None}},
    "notebooks": {"01_a": {"smoke": 0.5, "lab": 3.0}, "02_b": {"smoke": None, "lab": 2.0}},
}


def test_minutes_scale_with_the_speed_and_the_unmeasured_stays_unknown() -> None:
    assert machine_00.estimated_minutes(MEASURED, "smoke", 10_000) == {"01_a": 1.0, "02_b": None}
    assert machine_00.estimated_minutes(MEASURED, "lab", 10_000) == {"01_a": None, "02_b": None}
    assert machine_00.estimated_minutes(MEASURED, "gpu", 10_000) == {"01_a": None, "02_b": None}


def test_the_file_of_minutes_has_the_form_that_the_estimate_reads() -> None:
    measured = machine_00.read_minutes()
    assert set(measured["reference"]) == {"machine", "tokens_per_s"}
    assert set(machine_00.estimated_minutes(measured, "lab", 1.0)) == set(measured["notebooks"])


def test_speed_counts_tokens_of_whole_steps_without_the_first(run, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    update = Trainer.update

    def timed(trainer: Trainer) -> object:
        report = update(trainer)
        now[0] += 100 if trainer.step == 1 else 2  # the first one warms up
        return report

    monkeypatch.setattr(Trainer, "update", timed)
    assert machine_00.tokens_per_second(run.config, n_steps=3) == run.config.tokens_per_step / 2


def test_unmet_requirements_are_named(monkeypatch) -> None:
    required = ["pytest<10", "no-such-package-at-all>=2", 'pytest>=999; extra == "lab"']  # the first is met
    required += ['pytest>=999; extra == "other"', 'pytest>=999; python_version < "3"']  # these are not asked for
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    missing, version = "no-such-package-at-all>=2 is missing", metadata.version("pytest")
    assert machine_00.unmet_requirements() == [missing, f"pytest>=999, found {version}"]
    assert machine_00.unmet_requirements("none") == [missing]


@pytest.mark.parametrize(
    ("faster", "taken", "chosen"), [(1, 1.3, 1), (3, 0.9, 3), (1, 0.1, 1), (4, 0.1, 4), (4, 2.5, 1), (4, 4.0, 1)]
)
def test_threads_are_those_that_pay_and_a_busy_machine_is_told_in_one_line(faster, taken, chosen, monkeypatch) -> None:
    threads = [4]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(timeit, "repeat", lambda *_, **options: [1.0 if threads[-1] == faster else 2.0])
    monkeypatch.setattr(device, "cores_taken", lambda: taken)
    line = device.choose_threads(Config())
    assert threads[-1] == chosen
    said = f"others take {taken} of its 4 cores; computing with {chosen} thread{'s' if chosen > 1 else ''}"
    assert line == (f"this machine is busy: {said}" if taken > 0.5 else None)


def test_threads_that_were_asked_for_stay(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("changed"))
    assert device.choose_threads(Config()) is None


def test_cores_taken_sees_another_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            time.sleep(0.3)
            assert device.cores_taken() > 0.5
        finally:
            busy.kill()
