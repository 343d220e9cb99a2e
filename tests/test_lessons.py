"""Questions with and without a reader, and what a check of an exercise says."""

import asyncio
import math

import IPython.display
import ipywidgets
import pytest

from moe_lab.course.lessons import NO_GUESS, Question, answers, ask, exercise, guesses, reveal, score

OPTIONS = {
    "it falls": lambda m: m["last"] < m["first"],
    "it rises": lambda m: m["last"] > m["first"],
    "it stays": lambda m: m["last"] == m["first"],
}
LOSS = Question("What does a < b do?", OPTIONS, tempts="Because curves fall.")
NORM = Question("And the norm?", OPTIONS, tempts="")


def asked(question: Question) -> None:
    asyncio.run(ask(question))


@pytest.fixture(autouse=True)
def forget():
    yield
    guesses.clear()
    answers.clear()


@pytest.fixture
def shown(monkeypatch) -> list:
    """What a reader with a front end gets to see."""
    things: list = []
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "1")
    monkeypatch.setattr(IPython.display, "display", things.append)
    return things


def test_headless_there_is_no_guess_and_no_score(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    asked(LOSS)
    first, *options = capsys.readouterr().out.splitlines()
    assert first == LOSS.text
    assert [line[:6] for line in options] == ["  (a) ", "  (b) ", "  (c) "]
    assert sorted(line[6:] for line in options) == sorted(OPTIONS)
    reveal(LOSS, first=2, last=1)
    score()
    assert capsys.readouterr().out == "measured: it falls\n"


def test_options_are_shuffled_by_text_and_seed_alone() -> None:
    texts = [f"question {n}" for n in range(300)]
    places = [Question(text, OPTIONS, "").shuffled().index("it falls") for text in texts]
    assert places == [Question(text, OPTIONS, "").shuffled().index("it falls") for text in texts]
    assert places != [Question(text, OPTIONS, "", seed=1).shuffled().index("it falls") for text in texts]
    assert all(70 < places.count(place) < 130 for place in range(3))  # 100 expected, SD 8
    assert Question("question 0", OPTIONS, "").shuffled() == ["it stays", "it falls", "it rises"]  # on every machine


def test_a_reader_has_no_guess_before_a_click(shown, capsys) -> None:
    asked(LOSS)
    reveal(LOSS, first=2, last=1)
    score()
    assert capsys.readouterr().out.splitlines() == [
        "measured: it falls",
        "you did not guess",
        "Because curves fall.",
        "0 of 0 predictions were right",
    ]
    text, choice = shown[0].children
    assert text.value == "<b>What does a &lt; b do?</b>"
    assert isinstance(choice, ipywidgets.RadioButtons) and choice.index is None
    assert choice.options == (*LOSS.shuffled(), NO_GUESS)


def test_guesses_are_kept_and_scored_over_what_was_answered(shown, capsys) -> None:
    unanswered, unrevealed = (Question(f"{n}?", OPTIONS, "") for n in range(2))
    for question, guess in ((LOSS, "it falls"), (NORM, "it rises"), (unanswered, NO_GUESS), (unrevealed, "it falls")):
        asked(question)
        shown[-1].children[1].value = guess
    reveal(LOSS, first=2, last=1)
    assert "✓ as you predicted" in capsys.readouterr().out
    reveal(NORM, first=2, last=1)
    assert "✗ you predicted: it rises" in capsys.readouterr().out
    reveal(unanswered, first=2, last=1)
    assert "you did not guess" in capsys.readouterr().out
    score()
    assert capsys.readouterr().out == "1 of 2 predictions were right\n"
    asked(LOSS)  # again: not scored before it is revealed again
    score()
    assert capsys.readouterr().out == "0 of 1 predictions were right\n"


@pytest.mark.parametrize(
    ("measured", "found"),
    [({"first": math.nan, "last": 1}, "no option"), ({"first": 1, "last": 1}, "'it falls' and 'it stays'")],
    ids=["none", "two"],
)
def test_an_answer_that_is_not_one_option_is_a_mistake_of_the_notebook(measured, found) -> None:
    question = Question("?", OPTIONS | {"it falls": lambda m: m["last"] <= m["first"]}, "")
    with pytest.raises(AssertionError, match=rf"^question '\?': true of .+ is {found}; it must be one"):
        reveal(question, **measured)


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
