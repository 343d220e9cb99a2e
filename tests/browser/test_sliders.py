"""The sliders of notebook 03's number line, moved in a real browser: the picture and its text follow, as the sums say."""

import re
import time
from pathlib import Path

import nbformat
import pytest
from lab import opened_notebook, wait_for, write_notebook

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "03_bf16_underflow.ipynb"
IMPORT = "from moe_lab.show.explorables import explore_number_line"


@pytest.mark.timeout(120)
def test_moving_a_slider_draws_the_sum_that_it_says(tmp_path: Path) -> None:
    sources = [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.source == "explore_number_line()"]
    write_notebook(tmp_path / "line.ipynb", [IMPORT, *sources])
    with opened_notebook(tmp_path / "line.ipynb", height=800) as (page, _, crashes):
        picture = ".jp-OutputArea-output img"
        page.wait_for_selector(picture, timeout=40000)

        def shown() -> str:
            return page.locator(picture).get_attribute("alt") or ""

        def drawn() -> str:
            return page.locator(picture).get_attribute("src") or ""

        first = drawn()
        assert shown().startswith("1 − 0.0003")  # the slider then snaps to 3.02e-4
        assert "lost" in shown()
        page.click("button.jupyter-button:has-text('up')")
        wait_for(lambda: "1 + 0.0003" in shown() and "lost" in shown(), "the direction does not act")
        page.click("button.jupyter-button:has-text('down')")
        wait_for(lambda: "1 − 0.0003" in shown(), "the direction does not act twice")
        update = page.locator(".noUi-handle").nth(1)
        update.focus()
        for _ in range(60):  # a fiftieth of a decade each: from 3e-4 past 2^-9, where the sum is kept
            page.keyboard.press("ArrowRight")
            time.sleep(0.02)

        def step() -> float:
            found = re.search(r"1 − ([0-9.e-]+) =", shown())
            return float(found[1]) if found else 0.0

        wait_for(lambda: step() > 2**-9, "the update's slider does not act")
        assert "lost" not in shown()
        assert "lands on 0.99" in shown()
        page.locator(".noUi-handle").first.focus()
        for _ in range(24):  # three octaves: at a weight of 8 the same update is lost again
            page.keyboard.press("ArrowRight")
            time.sleep(0.02)
        wait_for(lambda: "8 − " in shown() and "lost" in shown(), "the weight's slider does not act")
        assert drawn() != first
        page.screenshot(path=tmp_path / "sliders.png")
        assert not crashes
