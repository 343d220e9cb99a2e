"""What makes a notebook a lesson: questions before results.

Questions stand in notebooks/checks/questions_NN.py, so that no notebook shows its answers in code.
"""

import asyncio
import html
import json
import random
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_lab.config import ROOT
from moe_lab.show.front import is_interactive
from moe_lab.train.record import write_atomically

NO_GUESS = "I'd rather not guess"
WAITING = (
    "The notebook waits here for your choice, and later cells ([*]) wait with it. Interrupt (■) goes on without one."
)
# options may be longer than a line; ipywidgets gives a group of buttons no name for screen readers; a button that goes takes the
# keys' focus with it; Run All scrolls to the end, and figures that are drawn above the question late push it out of sight again
GROUP = """<style>.moe-lab-options .jupyter-button {{white-space: normal; height: auto; text-align: left;
line-height: 1.5; padding: 4px 10px}}</style><b>{question}</b><img hidden src="data:," alt="{question}" onerror="
for (const ms of [300, 1000, 2000]) setTimeout(() => {{const box = this.closest('.moe-lab-options');
if (!box) return; box.role = 'group'; box.ariaLabel = this.alt; box.scrollIntoView({{block: 'nearest'}});
box.onclick = event => event.target.closest('button') && box.closest('.jp-Cell')?.nextElementSibling?.focus()}}, ms)">"""


@dataclass(frozen=True, eq=False)
class Question:
    """A question and its options, each with a predicate of what was measured, of which exactly one is to be true."""

    text: str
    options: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    tempts: str  # why the popular wrong answer tempts, and why it is wrong: shown with the answer
    scale: bool = False  # the options are degrees of one thing, in order, and keep it

    def shuffled(self, copies: int = 0) -> list[str]:
        """The options, if no scale in an order that text and seed decide, on every machine. `copies`: a reader's own seed."""
        anew = random.Random(f"{copies} {self.text}").sample(list(self.options), len(self.options))
        return list(self.options) if self.scale else anew

    def answer(self, measured: Mapping[str, Any]) -> str:
        """The option that is true of what was measured. Raises AssertionError unless it is exactly one."""
        true = [option for option, holds in self.options.items() if bool(holds(measured))]
        found = " and ".join(map(repr, true)) or "no option"
        assert len(true) == 1, f"question {self.text!r}: true of {dict(measured)} is {found}; it must be one"
        return true[0]


# What the reader chose and what was measured: of this kernel by question; of all notebooks, by the question's text, in
# the file that `make lab` lays beside the working copies, if it is there.
guesses: dict[Question, str] = {}
answers: dict[Question, str] = {}
KEPT = ROOT / "work" / "answers.json"
open_boxes: dict[Question, Callable[[], None]] = {}  # what closes the buttons of a question


def kept() -> dict[str, Any]:
    nothing = {"seed": 0, "guesses": {}, "answers": {}}
    return nothing | json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else nothing


def keep(what: str, question: Question, option: str) -> None:
    if KEPT.exists():
        entries = kept()
        entries[what][question.text] = option
        write_atomically(KEPT, json.dumps(entries, indent=1, ensure_ascii=False))


async def ask(question: Question) -> None:
    """Show the options and wait until one is chosen or Interrupt comes; where nobody can click, print them. A question
    that was answered before, on another day too, keeps its answer until another is chosen, and nothing waits."""
    answers.pop(question, None)  # asked again: not scored before it is revealed again
    if not is_interactive():
        lines = [f"  ({letter}) {option}" for letter, option in zip("abcdef", question.shuffled(), strict=False)]
        print(question.text, *lines, sep="\n")
        return
    if before := guesses.get(question) or kept()["guesses"].get(question.text):
        guesses[question] = before
    close_box(question)
    open_boxes[question] = show_options(question, before)
    try:
        while question not in guesses:
            await asyncio.sleep(0.05)
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("going on without a guess")  # none is kept: run again, the cell waits again
        close_box(question)


def show_options(question: Question, before: str | None) -> Callable[[], None]:
    """Buttons for the options, in an order of these copies' own; returns what puts a line of text in their place."""
    import ipywidgets
    from IPython.display import display

    def choose(option: str) -> None:
        guesses[question] = option
        keep("guesses", question, option)
        close_box(question)

    buttons = []
    for option in [*question.shuffled(kept()["seed"]), NO_GUESS]:
        buttons.append(ipywidgets.Button(description=option, tooltip=option, layout={"width": "auto"}))
        buttons[-1].on_click(lambda _, option=option: choose(option))
        buttons[-1].button_style = "info" if option == before else ""
    note = f"Your last answer: {before}. Another one takes its place; then reveal it again." if before else WAITING
    title = ipywidgets.HTML(GROUP.format(question=html.escape(question.text, quote=True)))
    box = ipywidgets.VBox([title, *buttons, ipywidgets.HTML(f"<i>{html.escape(note)}</i>")])
    box.add_class("moe-lab-options")
    handle = display(box, display_id=True)

    def close() -> None:  # a saved notebook would show the buttons as an error
        said = f"your answer: {guesses.get(question, 'none')} (run this cell again to change it)"
        handle.update({"text/plain": f"{question.text}\n{said}"}, raw=True)
        box.close()

    return close


def close_box(question: Question) -> None:
    open_boxes.pop(question, lambda: None)()


def reveal(question: Question, **measured: Any) -> None:
    """Print which option was measured, and to a reader whether it was the guess, and why another one tempts."""
    answers[question] = right = question.answer(measured)
    print(f"measured: {right}")
    if not is_interactive():
        return
    close_box(question)
    keep("answers", question, right)
    guess = guesses.get(question, NO_GUESS)
    said = {NO_GUESS: "you did not guess", right: "✓ as you predicted"}
    print(said.get(guess, f"✗ you predicted: {guess}"))
    print(textwrap.fill(question.tempts, 100))


def score() -> None:
    """Print how many of the reader's guesses were right; what was not guessed does not count. Headless, nothing."""
    if not is_interactive():
        return
    right, made = right_of({q.text: guess for q, guess in guesses.items()}, {q.text: a for q, a in answers.items()})
    print(f"{right} of {made} predictions were right; questions: {len(answers)}")
    in_all = right_of(kept()["guesses"], kept()["answers"])
    if in_all[1] > made:
        print(f"in all notebooks so far: {in_all[0]} of {in_all[1]}")


def right_of(guessed: Mapping[str, str], measured: Mapping[str, str]) -> tuple[int, int]:
    made = [text for text in measured if guessed.get(text, NO_GUESS) != NO_GUESS]
    return sum(guessed[text] == measured[text] for text in made), len(made)
