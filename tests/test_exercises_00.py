"""The checks of notebook 00 accept the printed solutions and refuse what a reader is likely to get wrong."""

import helpers
import pytest
from checks import exercises_00


@pytest.fixture
def solved() -> dict:
    return helpers.solved("00")


def test_the_solutions_pass(solved) -> None:
    assert exercises_00.check_run_minutes(solved["run_minutes"])
    assert exercises_00.check_next_token_loss(solved["next_token_loss"])


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda steps, tokens, speed: steps * tokens / speed, "give minutes"),
        (lambda steps, tokens, speed: steps / speed / 60, "take 1 minute"),
        (lambda steps, tokens, speed: speed / (steps * tokens) * 60, "half the time"),
        (lambda steps, tokens: 1, "TypeError"),
    ],
)
def test_run_minutes_refuses(wrong, hint, capsys) -> None:
    assert not exercises_00.check_run_minutes(wrong)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (None, "not started"),
        (lambda row, weights: row["losses"]["next_token"], "undo the weight"),
        (lambda row, weights: row["losses"]["next_token"] / weights[0], "undo the weight"),
        (lambda row, weights: sum(row["losses"].values()), "leave the routers' terms out"),
        (lambda row, weights: row["losses"]["next_token"] * sum(weights), "the same shares"),
        (lambda row, weights: row["losses"]["next_token"] / max(weights) * 2, "leave the routers' terms out"),
        (lambda row, weights: row["losses"]["next_token"] * len(weights), "divide by that"),
        (lambda row, weights: row["loss"], "KeyError"),
    ],
)
def test_next_token_loss_refuses(wrong, hint, capsys) -> None:
    assert not exercises_00.check_next_token_loss(wrong)
    assert hint in capsys.readouterr().out
