"""What makes a notebook a lesson: questions before results, and exercises whose checks say what is wrong.

    await ask(questions_03.cause)                            # shows the options; a person chooses one
    reveal(questions_03.cause, with_gradient=15, looks=15)   # which of them was measured
    score()

Questions stand in notebooks/checks/questions_NN.py, so that no notebook shows its answers in code.
"""

from __future__ import annotations

import functools
import html
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_lab.show.live import is_interactive

NO_GUESS = "I'd rather not guess"


@dataclass(frozen=True, eq=False)
class Question:
    """A question and its options, each with a predicate of what was measured, of which exactly one is to be true."""

    text: str
    options: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    tempts: str  # why the popular wrong answer tempts, and why it is wrong: shown with the answer
    seed: int = 0  # another one shuffles the options anew

    def shuffled(self) -> list[str]:
        """The options in an order that text and seed decide: the same on every machine."""
        return random.Random(f"{self.seed} {self.text}").sample(list(self.options), len(self.options))

    def answer(self, measured: Mapping[str, Any]) -> str:
        """The option that is true of what was measured. Raises AssertionError unless it is exactly one."""
        true = [option for option, holds in self.options.items() if bool(holds(measured))]
        found = " and ".join(map(repr, true)) or "no option"
        assert len(true) == 1, f"question {self.text!r}: true of {dict(measured)} is {found}; it must be one"
        return true[0]


# what the reader of this kernel chose, and what was measured: a notebook has a kernel of its own
guesses: dict[Question, str | None] = {}
answers: dict[Question, str] = {}


async def ask(question: Question) -> None:
    """Show the options to choose from. Where nobody can click, print them: then there is no guess."""
    guesses[question] = None
    answers.pop(question, None)  # asked again: not scored before it is revealed again
    options = question.shuffled()
    if not is_interactive():
        lines = [f"  ({letter}) {option}" for letter, option in zip("abcdef", options, strict=False)]
        print(question.text, *lines, sep="\n")
        return
    import ipywidgets
    from IPython.display import display

    layout = ipywidgets.Layout(width="auto")
    choice = ipywidgets.RadioButtons(options=[*options, NO_GUESS], index=None, layout=layout)
    choice.observe(lambda change: guesses.__setitem__(question, change["new"]), "value")
    display(ipywidgets.VBox([ipywidgets.HTML(f"<b>{html.escape(question.text)}</b>"), choice]))


def reveal(question: Question, **measured: Any) -> None:
    """Print which option was measured, and to a reader whether it was the guess, and why another one tempts."""
    answers[question] = right = question.answer(measured)
    print(f"measured: {right}")
    if not is_interactive():
        return
    guess = guesses.get(question)
    guessed = guess not in (None, NO_GUESS)
    print(("✓ as you predicted" if guess == right else f"✗ you predicted: {guess}") if guessed else "you did not guess")
    print(question.tempts)


def score() -> None:
    """Print how many of the reader's guesses were right; what was not answered does not count. Headless, nothing."""
    if is_interactive():
        made = [question for question in answers if guesses.get(question) not in (None, NO_GUESS)]
        right = sum(guesses[question] == answers[question] for question in made)
        print(f"{right} of {len(made)} predictions were right")


class Predictions:
    """Guesses made before a result is seen, and their score at the end. Headless, the first option stands for the reader;
    with a reader, there is no guess before a click."""

    def __init__(self) -> None:
        self.questions: dict[str, tuple[str, Sequence[str]]] = {}
        self.guesses: dict[str, str | None] = {}
        self.answers: dict[str, str] = {}

    def ask(self, key: str, question: str, options: Sequence[str]) -> None:
        """Show 3 or 4 options to choose from. Where nobody can click, print them."""
        self.questions[key] = question, options
        self.answers.pop(key, None)  # asked again: not scored before it is revealed again
        if not is_interactive():
            self.guesses[key] = options[0]
            lines = [f"  ({letter}) {option}" for letter, option in zip("abcd", options, strict=False)]
            print(question, *lines, sep="\n")
            return
        import ipywidgets
        from IPython.display import display

        self.guesses[key] = None
        layout = ipywidgets.Layout(width="auto")
        choice = ipywidgets.RadioButtons(options=list(options), index=None, layout=layout)
        choice.observe(lambda change: self.guesses.__setitem__(key, change["new"]), "value")
        display(ipywidgets.VBox([ipywidgets.HTML(f"<b>{html.escape(question)}</b>"), choice]))

    def reveal(self, key: str, right: str) -> None:
        """Print the guess beside what was measured, `right`, which must be one of the options."""
        options = self.questions[key][1]
        if right not in options:
            raise ValueError(f"{key}: {right!r} is not one of the options {list(options)}")
        self.answers[key] = right
        guess = self.guesses[key]
        verdict = "as predicted" if guess == right else f"predicted: {guess}" if guess else "you made no prediction"
        print(f"measured: {right} ({verdict})")

    def score(self) -> None:
        """Print how many of the revealed predictions were right."""
        right = sum(self.guesses[key] == answer for key, answer in self.answers.items())
        print(f"{right} of {len(self.answers)} predictions were right")


def exercise(check: Callable[..., None]) -> Callable[..., bool]:
    """Make a judge of a reader's answer from assertions about it: the first that fails is printed as a hint.

    The judge returns whether all hold; `None` in the answer's place is not started.
    """

    @functools.wraps(check)
    def judge(answer: object, *facts: object) -> bool:
        if answer is None:
            print("not started: replace None by your answer and run this cell again")
            return False
        try:
            check(answer, *facts)
        except AssertionError as error:
            print(f"not yet: {error}")
        except Exception as error:  # the reader's code may raise anything; say it, and go on
            print(f"not yet: your code raised {type(error).__name__}: {error}")
        else:
            print("right")
            return True
        return False

    return judge
