"""The dashboard and the number line in a real JupyterLab and a real browser: every button, every slider, and what a saved
notebook still shows.

It fails without chromium: the behaviour of buttons while a cell waits changed in most releases of ipykernel 7.
"""

import re
import time
from pathlib import Path

import nbformat
import pytest
from helpers import write_notebook
from lab import browser_page, command, jupyter_lab, run_all, wait_for
from playwright.sync_api import Page

NOTEBOOK_03 = Path(__file__).parents[2] / "notebooks" / "03_bf16_underflow.ipynb"
LINE = "explore_number_line()"  # a cell of notebook 03
CELLS = """import sys
sys.path.insert(0, {notebooks!r})
from checks.explore_03 import explore_number_line
from moe_lab import Trainer
from moe_lab.show import dashboard, live
from moe_lab.course import notebook
from moe_lab.train.record import read_jsonl
dashboard.REDRAW_S = 0.2
lab = notebook.begin(profile="smoke", overrides="training.steps=20000 training.log_interval=2", run_dir={run_dir!r})
---
trainer = Trainer(lab.config, run_dir=lab.run_dir)
run = live.LiveRun(trainer).start()
---
summary = await run.finished()
---
actions = [(row["action"], *([round(row["value"], 2)] if "value" in row else [])) for row in
           read_jsonl(lab.run_dir / "controls.jsonl")]
print("after:", summary["status"], actions)
---
{line}"""
ACTIONS = [("pause",), ("resume",), ("lr_scale", 1.41), ("lr_scale", 2.0), ("save",), ("stop",)]
RUN, SUM = (f".jp-OutputArea-output img[alt^='{start}']" for start in ("Step ", "1 "))  # pictures, by their texts


def text(page: Page) -> str:
    return page.inner_text(".jp-Notebook")


def step(page: Page) -> int:
    found = re.search(r"step (\d+)/20000", text(page))
    return int(found[1]) if found else 0


def click(page: Page, label: str) -> None:
    page.click(f"button.jupyter-button:has-text('{label}')")


@pytest.mark.timeout(240)
def test_buttons_and_sliders_act_and_the_saved_notebook_stays_readable(tmp_path: Path) -> None:
    line = next(cell.source for cell in nbformat.read(NOTEBOOK_03, 4).cells if cell.source == LINE)
    cells = CELLS.format(run_dir=str(tmp_path / "run"), line=line, notebooks=str(NOTEBOOK_03.parent)).split("\n---\n")
    write_notebook(tmp_path / "live.ipynb", *cells)
    with jupyter_lab(tmp_path) as address, browser_page() as (page, crashes):
        page.goto(f"{address}/doc/tree/live.ipynb?reset")
        run_all(page)
        steer_the_run(page, tmp_path)
        move_the_number_line(page)
        page.screenshot(path=tmp_path / "stopped.png")
        command(page, "docmanager:save")
        wait_for(lambda: "after: interrupted" in (tmp_path / "live.ipynb").read_text(), "the notebook was not saved")
        command(page, "kernelmenu:shutdown")
        page.goto("about:blank")
        page.goto(f"{address}/doc/tree/live.ipynb?reset")
        page.wait_for_selector(RUN, timeout=40000)
        time.sleep(0.5)
        page.screenshot(path=tmp_path / "reloaded.png")
        shown = page.locator(".jp-CodeCell", has=page.locator(RUN)).inner_text()
        assert "interrupted · step" in shown
        assert not re.search("Loading widget|Error displaying|model not found", shown)
        assert not crashes


def steer_the_run(page: Page, folder: Path) -> None:
    """Each control, while a cell waits for the run's end."""
    page.wait_for_selector("button.jupyter-button:has-text('Stop')", timeout=40000)
    page.wait_for_selector(RUN, timeout=20000)
    wait_for(lambda: step(page) > 5, "the run does not move")
    click(page, "Pause")
    wait_for(lambda: "paused" in text(page), "Pause does not act while a cell waits")
    time.sleep(0.5)  # the label follows within REDRAW_S
    frozen = step(page)
    time.sleep(0.6)
    assert step(page) == frozen
    click(page, "Resume")
    wait_for(lambda: step(page) > frozen, "Resume does not act")
    page.locator(".noUi-handle").first.focus()
    for scale in ("1.41", "2"):  # half an octave each; the second move shows that the slider is still alive
        page.keyboard.press("ArrowRight")
        wait_for(lambda scale=scale: f"LR × {scale}" in text(page), f"the slider did not reach {scale}")
    click(page, "Checkpoint")
    page.screenshot(path=folder / "running.png")
    clicked = time.monotonic()
    click(page, "Stop")
    wait_for(lambda: f"after: interrupted {ACTIONS}" in text(page), "Stop does not act while a cell waits")
    assert time.monotonic() - clicked < 30  # the run itself would take minutes more
    assert (folder / "run" / "checkpoints" / "checkpoint_interrupted.pt").exists()
    assert "interrupted · step" in text(page)
    assert not page.locator("button.jupyter-button:has-text('Stop')").count()


def move_the_number_line(page: Page) -> None:
    """The direction, the update, the weight: the picture's text says the sum that each makes."""
    picture = page.locator(".jp-OutputArea-output img").last
    page.wait_for_selector(SUM, timeout=20000)
    first = picture.get_attribute("src")

    def shows(pattern: str) -> bool:
        return bool(re.search(pattern, picture.get_attribute("alt")))

    assert shows("^1 − 0.0003.*lost")  # the slider then snaps to 3.02e-4
    click(page, "up")
    wait_for(lambda: shows("^1 . 0.0003.*lost") and not shows("−"), "the direction does not act")
    click(page, "down")
    wait_for(lambda: shows("^1 − 0.0003"), "the direction does not act twice")
    press(page, handle=1, times=12)  # a tenth of a decade each: from 3e-4 past 2^-9, where the sum is kept
    wait_for(lambda: shows("^1 − 0.00[4-9].*lands on 0.99"), "the update's slider does not act")
    press(page, handle=0, times=5)  # three octaves: at a weight of 8 the same update is lost again
    wait_for(lambda: shows("^8 − .*lost"), "the weight's slider does not act")
    assert picture.get_attribute("src") != first


def press(page: Page, handle: int, times: int) -> None:
    """Move a slider by five of its smallest steps at a time."""
    page.locator(".noUi-handle").nth(handle).focus()
    for _ in range(times):
        page.keyboard.press("PageUp")
