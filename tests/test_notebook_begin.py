"""How a notebook begins: its parameters, its run's directory, its claims."""

import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import refused

from moe_lab.config import ConfigError
from moe_lab.course import notebook
from moe_lab.failures.results import spread


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (bool, "false", False),
        (bool, "True", True),
        (bool, True, True),
        (float, "1e-3", 0.001),
        (float, 2, 2.0),
        (int, "3", 3),
        (int, 2000, 2000),
        (str, "lab", "lab"),
        (list, "a.b=1, c.d=[1, 2] e.f=x", ["a.b=1", "c.d=[1, 2]", "e.f=x"]),
        (list, ["a.b=1"], ["a.b=1"]),
    ],
)
def test_cast_takes_what_says_the_same(kind, value, expected) -> None:
    result = notebook.cast("name", value, kind)
    assert result == expected
    assert type(result) is kind


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (bool, "flase", "='flase' must be true or false"),
        (bool, 1, "=1 must be true or false"),
        (int, "1.5", "=1.5 must be a whole number"),
        (int, True, "=True must be a whole number"),
        (int, "many", "='many' must be a whole number"),
        (float, "nan", "='nan' must be a number"),
        (str, 3, "=3 must be text"),
        (list, [1], r"\[0\]=1 must be text"),
        (list, 1, r"=1 must be a list, such as \[1, 2\]"),
        (int, "[", ", line 1: not valid YAML: .+"),
    ],
)
def test_cast_refuses_the_rest_in_one_line(kind, value, message) -> None:
    with refused(ConfigError, match=f"^parameter name{message}$"):
        notebook.cast("name", value, kind)


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [(None, None, "lab"), ("", "smoke", "smoke"), ("gpu", "smoke", "gpu"), (None, "smoke", "smoke")],
)
def test_a_parameter_wins_over_the_environment_which_wins_over_the_default(given, environment, expected, monkeypatch):
    monkeypatch.delenv("MOE_LAB_PROFILE", raising=False)
    if environment:
        monkeypatch.setenv("MOE_LAB_PROFILE", environment)
    assert notebook.resolve(profile=given).profile == expected


def test_begin_resolves_the_run_from_any_directory(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    lab = notebook.begin(config="configs/smoke.yaml", overrides="training.steps=7 training.max_lr=1e-3", seed="5")
    assert (lab.profile, lab.config.n_steps, lab.config.training.max_lr) == ("smoke", 7, 0.001)
    assert lab.config.training.seed == 5
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d{6}_smoke(_\d+)?", lab.run_dir.name)
    assert lab.run_dir.parent == lab.root / "runs"
    assert not lab.run_dir.exists()
    lab.provenance()
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"commit \S+ · Python 3\.\S+ · torch \S+ · cpu: \d+ cores, .+ with(out)? bf16 units · profile smoke · seed 5",
        last,
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"proflie": "lab"}, "unknown parameter 'proflie'; did you mean profile?"),
        ({"profile": "smok"}, "profile='smok' is not one of smoke, lab, gpu; did you mean smoke?"),
        (
            {"profile": "smoke", "overrides": "training.step=3"},
            "override: unknown key training.step; did you mean steps?",
        ),
        ({"profile": "smoke", "resume": "true"}, "resume=True needs run_dir"),
        ({"config": "configs/smoek.yaml"}, "did you mean .*smoke.yaml"),
    ],
    ids=str,
)
def test_begin_refuses_in_one_line(parameters, message) -> None:
    with refused(ConfigError, match=message):
        notebook.begin(**parameters)


def test_a_run_directory_named_automatically_makes_room_for_another_run(tmp_path) -> None:
    given = notebook.resolve(profile="smoke", run_dir=str(tmp_path))
    (tmp_path / "record.jsonl").touch()
    assert given.fresh_run_dir() == tmp_path  # the trainer says what to do about a directory that was asked for
    named = notebook.Lab(given.config, "smoke", tmp_path, run_dir_given=False, resume=False)
    assert named.fresh_run_dir() == tmp_path.with_name(f"{tmp_path.name}_2")


def test_claims_print_one_stable_line_or_fail(capsys) -> None:
    notebook.claim("05.1", True, "validation loss is below the trigram")
    assert capsys.readouterr().out == "05.1 holds: validation loss is below the trigram\n"
    with pytest.raises(AssertionError, match=r"^05\.1 does not hold: validation loss is below the trigram$"):
        notebook.claim("05.1", False, "validation loss is below the trigram")


def test_a_claims_numbers_are_kept_where_the_environment_says(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MOE_LAB_CLAIMS", str(tmp_path / "claims.jsonl"))
    monkeypatch.setenv("MOE_LAB_PROFILE", "smoke")
    notebook.claim(
        "05.1", True, "it falls", loss=np.float32(1 / 3), by_seed={1: torch.tensor([0.5, 2])}, n=3, cost=spread([1, 2])
    )
    notebook.claim("05.2", True, "it stays")
    lines = [json.loads(line) for line in (tmp_path / "claims.jsonl").read_text().splitlines()]
    numbers = {"loss": 0.333333, "by_seed": {"1": [0.5, 2]}, "n": 3, "cost": {"mean": 1.5, "sd": 0.707107, "n": 2}}
    assert lines[0] == {"id": "05.1", "statement": "it falls", "numbers": numbers, "profile": "smoke"}
    assert lines[1]["numbers"] == {}
    with refused(ConfigError, match=r"05\.3: loss=nan must be finite"):
        notebook.claim("05.3", True, "it falls", loss=math.nan)
    with pytest.raises(AssertionError):
        notebook.claim("05.4", False, "it falls", loss=1)
    assert len((tmp_path / "claims.jsonl").read_text().splitlines()) == 2
    assert "1" not in capsys.readouterr().out.replace("05.1", "")  # the printed line has no number
