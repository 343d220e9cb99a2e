"""What makes a notebook a lesson: predictions before results, and exercises whose checks say what is wrong."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence

from moe_lab.show.live import is_interactive


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
