"""The exercises of notebooks 08 and 09 in which a config is judged or edited: the printed solution passes, likely mistakes do not."""

import pytest
from checks import exercises_08, exercises_09
from helpers import solved

PLANS = {"A": "the schedule", "B": "the batch", "C": "sound", "D": "a learning rate"}


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (PLANS | {"A": "sound"}, "how many of its updates"),
        (PLANS | {"B": "sound"}, "counts no operations"),
        (PLANS | {"C": "a learning rate"}, "what is left to accuse"),
        (PLANS | {"D": "the batch"}, "look at the rates"),
        ({"A": "sound"}, "a dict of A, B, C, D"),
        (PLANS | {"A": "healthy"}, "the words are"),
    ],
)
def test_a_plan_is_judged_by_the_tools(wrong: dict, hint: str, capsys) -> None:
    assert exercises_09.check_trouble(solved("09")["trouble"])
    assert not exercises_09.check_trouble(wrong)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"logging_steps": 4}, "which option filters it"),
        ({"max_steps": 5}, "that is no cure"),
        ({"logging_strategy": "no"}, "no loss at all"),
        ("logging_nan_inf_filter=False", "a dict of TrainingArguments"),
    ],
)
def test_a_log_that_hides_a_loss_is_refused(wrong: object, hint: str, capsys) -> None:
    assert not exercises_08.check_options(wrong)
    assert hint in capsys.readouterr().out


def test_a_log_that_shows_it_passes() -> None:
    assert exercises_08.check_options({"logging_nan_inf_filter": False})
