"""Questions with and without a reader, and what a check of an exercise says."""

import asyncio
import math
from types import SimpleNamespace

import IPython.display
import ipywidgets
import pytest
from checks.exercise import exercise

from moe_lab.course import lessons
from moe_lab.course.lessons import NO_GUESS, Question, answers, ask, guesses, reveal, score

OPTIONS = {
    "it falls": lambda m: m["last"] < m["first"],
    "it rises": lambda m: m["last"] > m["first"],
    "it stays": lambda m: m["last"] == m["first"],
}
LOSS = Question("What does a < b do?", OPTIONS, tempts="Because curves fall.")
NORM = Question("And the norm?", OPTIONS, tempts="")


def asked(question: Question, click: str | None = None) -> None:
    """Run the cell; a reader who is there clicks as soon as there are buttons."""

    async def cell() -> None:
        waiting = asyncio.create_task(ask(question))
        await asyncio.sleep(0.01)
        if click:
            assert not waiting.done(), "the cell did not wait"
            press(click)
        await waiting

    asyncio.run(asyncio.wait_for(cell(), 5))


@pytest.fixture(autouse=True)
def forget(monkeypatch, tmp_path):
    monkeypatch.setattr(lessons, "KEPT", tmp_path / "answers.json")
    yield
    guesses.clear()
    answers.clear()
    lessons.open_boxes.clear()


BOXES: list = []  # what was shown, and what was put in its place
TEXTS: list[str] = []


@pytest.fixture
def shown(monkeypatch) -> list:
    """What a reader with a front end gets to see."""
    BOXES.clear(), TEXTS.clear()
    handle = SimpleNamespace(update=lambda bundle, raw: TEXTS.append(bundle["text/plain"]))

    def display(box, display_id):
        BOXES.append(box)
        return handle

    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "1")
    monkeypatch.setattr(IPython.display, "display", display)
    return BOXES


def buttons() -> list[ipywidgets.Button]:
    return [child for child in BOXES[-1].children if isinstance(child, ipywidgets.Button)]


def press(option: str) -> None:
    next(button for button in buttons() if button.description == option).click()


def closed(answer: str) -> str:
    return f"{LOSS.text}\nyour answer: {answer} (run this cell again to change it)"


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
    assert places != [Question(text, OPTIONS, "").shuffled(1).index("it falls") for text in texts]
    assert all(70 < places.count(place) < 130 for place in range(3))  # 100 expected, SD 8
    assert Question("question 0", OPTIONS, "").shuffled() == ["it stays", "it falls", "it rises"]  # on every machine


def test_a_scale_keeps_its_order(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    degrees = {f"{n} times": lambda m, n=n: m["times"] == n for n in range(6)}
    asked(Question("How often?", degrees, "", scale=True))
    assert [line[6:] for line in capsys.readouterr().out.splitlines()[1:]] == list(degrees)


def test_the_cell_waits_for_a_click(shown, capsys) -> None:
    asked(LOSS, "it falls")
    title, *_, note = shown[0].children
    assert "<b>What does a &lt; b do?</b>" in title.value and 'alt="What does a &lt; b do?"' in title.value
    assert [button.description for button in buttons()] == [*LOSS.shuffled(), NO_GUESS]
    assert "later cells ([*]) wait with it. Interrupt (■) goes on without one" in note.value
    assert [closed("it falls")] == TEXTS, "the buttons stay in the saved notebook"
    assert capsys.readouterr().out == ""


def test_interrupt_goes_on_without_a_guess(shown, capsys) -> None:
    async def cell() -> None:
        waiting = asyncio.create_task(ask(LOSS))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await waiting

    asyncio.run(cell())
    assert capsys.readouterr().out == "going on without a guess\n"
    assert [closed("none")] == TEXTS
    reveal(LOSS, first=2, last=1)
    assert "you did not guess" in capsys.readouterr().out
    score()
    assert capsys.readouterr().out == "0 of 0 predictions were right; questions: 1\n"
    asked(LOSS, "it falls")  # the cell waits again


def test_guesses_are_kept_and_scored_over_what_was_answered(shown, capsys) -> None:
    unanswered, unrevealed = (Question(f"{n}?", OPTIONS, "") for n in range(2))
    for question, guess in ((LOSS, "it falls"), (NORM, "it rises"), (unanswered, NO_GUESS), (unrevealed, "it falls")):
        asked(question, guess)
    reveal(LOSS, first=2, last=1)
    assert capsys.readouterr().out.splitlines() == ["measured: it falls", "✓ as you predicted", "Because curves fall."]
    reveal(NORM, first=2, last=1)
    assert "✗ you predicted: it rises" in capsys.readouterr().out
    reveal(unanswered, first=2, last=1)
    assert "you did not guess" in capsys.readouterr().out
    score()
    assert capsys.readouterr().out == "1 of 2 predictions were right; questions: 3\n"


def test_a_question_asked_again_keeps_its_answer_and_does_not_wait(shown, capsys) -> None:
    asked(LOSS, "it rises")
    reveal(LOSS, first=2, last=1)
    asked(LOSS)
    score()
    assert capsys.readouterr().out.endswith(
        "0 of 0 predictions were right; questions: 0\n"
    )  # not before it is revealed again
    assert [b.description for b in buttons() if b.button_style] == ["it rises"]
    assert "Your last answer: it rises." in shown[-1].children[-1].value
    reveal(LOSS, first=2, last=1)
    assert "✗ you predicted: it rises" in capsys.readouterr().out
    told = closed("it rises")
    assert [told, told] == TEXTS, "its buttons stay in the saved notebook"
    asked(LOSS)
    press("it falls")
    reveal(LOSS, first=2, last=1)
    assert "✓ as you predicted" in capsys.readouterr().out


def test_answers_and_the_options_order_are_kept_across_notebooks(shown, capsys) -> None:
    """The file that `make lab` lays beside the copies; without it nothing is written."""
    asked(NORM, "it stays")
    assert not lessons.KEPT.exists()
    lessons.KEPT.write_text(
        '{"seed": 1, "guesses": {"of another notebook": "x"}, "answers": {"of another notebook": "x"}}'
    )
    asked(LOSS, "it rises")
    assert [button.description for button in buttons()] == [*LOSS.shuffled(1), NO_GUESS] != [*LOSS.shuffled(), NO_GUESS]
    reveal(LOSS, first=2, last=1)
    guesses.clear(), answers.clear()  # another kernel
    asked(LOSS)
    reveal(LOSS, first=2, last=1)
    assert "✗ you predicted: it rises" in capsys.readouterr().out
    score()
    assert capsys.readouterr().out.splitlines() == [
        "0 of 1 predictions were right; questions: 1",
        "in all notebooks so far: 1 of 2",
    ]


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
