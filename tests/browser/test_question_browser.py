"""A question that waits stays in sight, whatever grows above it after it was shown; once it is answered, keys go on."""

from pathlib import Path

import pytest
from helpers import write_notebook
from lab import READY, browser_page, jupyter_lab, run_all, wait_for

ABOVE = """from IPython.display import HTML, display

display(HTML('<div id="late"></div>'))"""
ASKS = """from moe_lab.course.lessons import Question, ask

await ask(Question({text!r}, {{"yes": bool, "no": bool}}, tempts=""))"""
BUTTONS = ".moe-lab-options button"


@pytest.mark.timeout(120)
def test_what_grows_above_a_question_does_not_push_it_out_of_sight(tmp_path: Path) -> None:
    write_notebook(tmp_path / "question.ipynb", ABOVE, ASKS.format(text="Is it in sight?"))
    with jupyter_lab(tmp_path) as address, browser_page() as (page, crashes):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{address}/doc/tree/question.ipynb?reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook")
        run_all(page)
        page.wait_for_selector(BUTTONS, timeout=60000)
        page.wait_for_timeout(600)
        page.evaluate("document.getElementById('late').style.height = '1500px'")
        page.wait_for_timeout(2000)
        last = page.locator(BUTTONS).last.bounding_box()
        assert 0 < last["y"] < 900 - last["height"], last
        assert crashes == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("key", [None, "Space"])
def test_after_an_answer_shift_enter_runs_the_next_cell(key: str | None, tmp_path: Path) -> None:
    """By mouse and by key: the buttons go, and with them what had the focus."""
    write_notebook(tmp_path / "focus.ipynb", ASKS.format(text="Does it go on?"), "print(6 * 7)", "print(6 * 8)")
    with jupyter_lab(tmp_path) as address, browser_page() as (page, crashes):
        page.goto(f"{address}/doc/tree/focus.ipynb?reset")
        page.wait_for_function(READY, timeout=60000)
        page.locator(".jp-CodeCell .jp-InputArea-editor").first.click()
        page.keyboard.press("Shift+Enter")
        page.wait_for_selector(BUTTONS, timeout=60000)
        page.wait_for_timeout(500)
        first = page.locator(BUTTONS).first
        first.press(key) if key else first.click()
        page.wait_for_selector(BUTTONS, state="detached", timeout=20000)
        page.wait_for_timeout(500)
        shown = page.locator(".jp-OutputArea-output")
        for number in ("42", "48"):
            page.keyboard.press("Shift+Enter")
            wait_for(
                lambda number=number: number in shown.last.inner_text(), f"the cell that prints {number} does not run"
            )
        assert crashes == []
