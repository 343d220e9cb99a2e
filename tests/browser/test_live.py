"""The dashboard and the number line in a real JupyterLab and a real browser: every button, every slider, and what a saved
notebook still shows.

It fails without chromium: the behaviour of buttons while a cell waits changed in most releases of ipykernel 7.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from lab import COMMAND, jupyter_lab, opened_notebook, wait_for, write_notebook

NOTEBOOK_03 = Path(__file__).parents[2] / "notebooks" / "03_bf16_underflow.ipynb"
IMPORT = "from moe_lab.show.explorables import explore_number_line"
CELLS = """from moe_lab import Trainer
from moe_lab.show.live import LiveRun
from moe_lab.course import notebook
from moe_lab.train.record import read_jsonl
lab = notebook.begin(profile="smoke", overrides="training.steps=20000 training.log_interval=2", run_dir={run_dir!r})
---
trainer = Trainer(lab.config, run_dir=lab.run_dir)
run = LiveRun(trainer).start()
---
summary = await run.finished()
---
actions = [(row["action"], *([round(row["value"], 2)] if "value" in row else [])) for row in
           read_jsonl(lab.run_dir / "controls.jsonl")]
print("after:", summary["status"], actions)"""
ACTIONS = [("pause",), ("resume",), ("lr_scale", 1.41), ("lr_scale", 2.0), ("save",), ("stop",)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of one JupyterLab for all tests here; its notebooks lie in `folder`."""
    with jupyter_lab(folder) as address:
        yield address


def click(page, text: str) -> None:
    page.click(f"button.jupyter-button:has-text('{text}')")


@pytest.mark.timeout(240)
def test_buttons_work_while_a_cell_waits_and_the_saved_notebook_stays_readable(
    folder: Path, address: str, tmp_path: Path
) -> None:
    notebook = folder / "live.ipynb"
    write_notebook(notebook, CELLS.format(run_dir=str(tmp_path / "run")).split("\n---\n"))
    with opened_notebook(notebook.name, address, height=1000) as (page, crashes):
        page.wait_for_selector("button.jupyter-button:has-text('Stop')", timeout=40000)
        page.wait_for_selector(".jp-OutputArea-output img", timeout=20000)

        def text() -> str:
            return page.inner_text(".jp-Notebook")

        def step() -> int:
            found = re.search(r"step (\d+)/20000", text())
            return int(found[1]) if found else 0

        wait_for(lambda: step() > 5, "the run does not move")
        click(page, "Pause")
        wait_for(lambda: "paused" in text(), "Pause does not act while a cell waits")
        time.sleep(1.2)  # the label follows within a second
        frozen = step()
        time.sleep(1.5)
        assert step() == frozen
        click(page, "Resume")
        wait_for(lambda: step() > frozen, "Resume does not act")
        handle = page.locator(".noUi-handle").first
        handle.focus()
        for scale in ("1.41", "2"):  # half an octave each; the second move shows that the slider is still alive
            page.keyboard.press("ArrowRight")
            wait_for(lambda scale=scale: f"LR × {scale}" in text(), f"the slider did not reach {scale}")
        click(page, "Checkpoint")
        page.screenshot(path=tmp_path / "running.png")
        clicked = time.monotonic()
        click(page, "Stop")
        wait_for(lambda: f"after: interrupted {ACTIONS}" in text(), "Stop does not act while a cell waits")
        assert time.monotonic() - clicked < 30  # the run itself would take minutes more
        assert (tmp_path / "run" / "checkpoints" / "checkpoint_interrupted.pt").exists()
        assert "interrupted · step" in text()
        assert not page.locator("button.jupyter-button:has-text('Stop')").count()
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        wait_for(lambda: "after: interrupted" in notebook.read_text(), "the notebook was not saved")
        page.screenshot(path=tmp_path / "stopped.png")
        page.evaluate(COMMAND, "kernelmenu:shutdown")
        page.goto("about:blank")

        page.goto(f"{address}/doc/tree/live.ipynb?reset")
        picture = page.wait_for_selector(".jp-OutputArea-output img", timeout=40000)
        time.sleep(1)
        page.screenshot(path=tmp_path / "reloaded.png")
        assert picture.get_attribute("alt").startswith("Step ")
        assert "interrupted · step" in text()
        assert not re.search("Loading widget|Error displaying|model not found", text())
        assert not crashes


@pytest.mark.timeout(240)
def test_moving_a_slider_draws_the_sum_that_it_says(folder: Path, address: str, tmp_path: Path) -> None:
    sources = [cell.source for cell in nbformat.read(NOTEBOOK_03, 4).cells if cell.source == "explore_number_line()"]
    write_notebook(folder / "line.ipynb", [IMPORT, *sources])
    with opened_notebook("line.ipynb", address, height=800) as (page, crashes):
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
