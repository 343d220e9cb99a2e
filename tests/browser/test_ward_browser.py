"""The desk of the ward in a real JupyterLab: a look is ordered, another one kept beside it, a mistake is told, a note is
written down and scored."""

from pathlib import Path

import pytest
from helpers import write_notebook
from lab import browser_page, jupyter_lab, run_all
from playwright.sync_api import Page

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CELL = f"""import sys
from pathlib import Path

sys.path.insert(0, {str(NOTEBOOKS)!r})
from checks import ward_notes
from checks.ward import open_ward
from checks.ward_desk import show_desk

ward_notes.NOTES = Path("notes").absolute()
show_desk(open_ward(1))"""


def press(page: Page, label: str, then: str) -> None:
    """Press a button, and wait for what it says below."""
    page.click(f"button.jupyter-button:has-text('{label}')")
    page.wait_for_selector(f".jp-OutputArea-output:has-text('{then}')", timeout=20000)


@pytest.mark.timeout(240)
def test_a_look_a_note_and_a_score(tmp_path: Path) -> None:
    write_notebook(tmp_path / "ward.ipynb", CELL)
    with jupyter_lab(tmp_path) as address, browser_page() as (page, crashes):
        page.goto(f"{address}/doc/tree/ward.ipynb?reset")
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook")
        run_all(page)
        page.wait_for_selector("button.jupyter-button:has-text('write it down')", timeout=60000)
        run, cause, _, cure, _ = page.locator(".widget-dropdown select").all()
        press(page, "write it down", "name a cause")
        run.select_option("run 2")
        press(page, "tokens · 1 min", "collisions × vocabulary")
        press(page, "floors · 1 min", "2 min on this run so far")
        figure = page.wait_for_selector("figure img[alt^='run 2: training ends']")
        # nothing is kept yet: as wide as it is drawn, 7 inches of 80 pixels, which half a page has as well
        assert figure.bounding_box()["width"] == 560
        below = page.locator("button.jupyter-button:has-text('write it down')")
        place = below.bounding_box()["y"]
        press(page, "config · free", "vocab_size")
        assert below.bounding_box()["y"] < place + 450  # a config of 70 lines scrolls, and the note stays in sight
        press(page, "tokens · paid", "paid already")
        page.click("button.jupyter-button:has-text('keep this reading')")
        run.select_option("run 3")
        press(page, "tokens · 1 min", "run 3, tokens: 1 min")
        shown = page.locator(".jp-OutputArea-output:visible").all_inner_texts()
        page.screenshot(path=tmp_path / "beside.png", full_page=True)
        assert [text[:13] for text in shown if text.startswith("run ")][-2:] == ["run 3, tokens", "run 2, tokens"]
        run.select_option("run 2")
        cause.select_option("experts collapsed")
        page.locator(".widget-select-multiple select, .widget-select select").first.select_option(["tokens"])
        cure.select_option("a balancing that acts")
        press(page, "write it down", "run 2: experts collapsed; 2 minutes")
        press(page, "score", "0 of 1 right")
        assert crashes == []
        assert "experts collapsed" in (tmp_path / "notes" / "notes_1.json").read_text()
