"""Predictions with and without a reader, and what a check of an exercise says."""

import IPython.display
import ipywidgets
import pytest

from moe_lab.course.lessons import Predictions, exercise

OPTIONS = ["falls", "rises", "stays"]


@pytest.fixture
def shown(monkeypatch) -> list:
    """What a reader with a front end gets to see."""
    things: list = []
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "1")
    monkeypatch.setattr(IPython.display, "display", things.append)
    return things


def test_headless_prints_the_options_and_takes_the_first(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    predictions = Predictions()
    predictions.ask("loss", "What does the loss do?", OPTIONS)
    predictions.ask("norm", "And the norm?", OPTIONS)
    predictions.ask("never", "Not revealed", OPTIONS)
    assert capsys.readouterr().out.startswith("What does the loss do?\n  (a) falls\n  (b) rises\n  (c) stays\n")
    predictions.reveal("loss", "falls")
    predictions.reveal("norm", "stays")
    predictions.score()
    assert capsys.readouterr().out.splitlines() == [
        "measured: falls (as predicted)",
        "measured: stays (predicted: falls)",
        "1 of 2 predictions were right",
    ]


def test_a_reader_has_no_guess_before_a_click(shown, capsys) -> None:
    predictions = Predictions()
    predictions.ask("loss", "a < b?", OPTIONS)
    predictions.reveal("loss", "falls")
    predictions.score()
    assert capsys.readouterr().out == "measured: falls (you made no prediction)\n0 of 1 predictions were right\n"

    text, choice = shown[0].children
    assert text.value == "<b>a &lt; b?</b>"
    assert isinstance(choice, ipywidgets.RadioButtons) and choice.index is None
    choice.value = "rises"
    predictions.reveal("loss", "rises")
    assert capsys.readouterr().out == "measured: rises (as predicted)\n"


def test_a_question_asked_again_is_not_scored_before_it_is_revealed_again(shown, capsys) -> None:
    predictions = Predictions()
    predictions.ask("loss", "?", OPTIONS)
    shown[0].children[1].value = "falls"
    predictions.reveal("loss", "falls")
    predictions.ask("loss", "?", OPTIONS)
    predictions.score()
    assert capsys.readouterr().out.endswith("0 of 0 predictions were right\n")


def test_an_answer_that_is_no_option_is_a_mistake_of_the_notebook() -> None:
    predictions = Predictions()
    predictions.questions["loss"] = "?", OPTIONS
    with pytest.raises(ValueError, match="loss: 'fell' is not one of the options"):
        predictions.reveal("loss", "fell")


@pytest.mark.parametrize(
    ("answer", "said", "right"),
    [
        (None, "not started", False),
        (3, "not yet: it is even", False),
        ("x", "your code raised TypeError", False),
        (8, "not yet: it is below 5", False),
        (4, "right", True),
    ],
)
def test_the_first_assertion_that_fails_gives_its_hint(answer, said, right, capsys) -> None:
    @exercise
    def check(answer) -> None:
        assert answer % 2 == 0, "it is even"
        assert answer < 5, "it is below 5"

    assert check(answer) is right
    assert said in capsys.readouterr().out
