"""A question that waits stays in sight, whatever grows above it after it was shown."""

from pathlib import Path

import pytest
from helpers import write_notebook
from lab import browser_page, jupyter_lab, run_all

ABOVE = """from IPython.display import HTML, display

display(HTML('<div id="late"></div>'))"""
ASKS = """from moe_lab.course.lessons import Question, ask

await ask(Question("Is it in sight?", {"yes": bool, "no": bool}, tempts=""))"""


@pytest.mark.timeout(120)
def test_what_grows_above_a_question_does_not_push_it_out_of_sight(tmp_path: Path) -> None:
    write_notebook(tmp_path / "question.ipynb", ABOVE, ASKS)
    with jupyter_lab(tmp_path) as address, browser_page() as (page, crashes):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"{address}/doc/tree/question.ipynb?reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook")
        run_all(page)
        page.wait_for_selector(".moe-lab-options button", timeout=60000)
        page.wait_for_timeout(600)
        page.evaluate("document.getElementById('late').style.height = '1500px'")
        page.wait_for_timeout(2000)
        last = page.locator(".moe-lab-options button").last.bounding_box()
        assert 0 < last["y"] < 900 - last["height"], last
        assert crashes == []
