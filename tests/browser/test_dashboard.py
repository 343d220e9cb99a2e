"""A run through what happens to pages: a failure is switched on and found, the page is loaded again, the cell is run again while
another one waits, the kernel dies."""

import re
from pathlib import Path

import pytest
from helpers import write_notebook
from lab import READY, browser_page, command, jupyter_lab, run_all, wait_for
from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]
CELLS = """import sys
sys.path.insert(0, {notebooks!r})
from checks import runs_05
from moe_lab import Trainer, health
from moe_lab.show import dashboard, live
from moe_lab.course import notebook
from moe_lab.course.notebook import first_free
dashboard.REDRAW_S = 0.2
lab = notebook.begin(profile="smoke", overrides="training.steps=20000 training.log_interval=5", run_dir={run_dir!r})
---
trainer = Trainer(lab.config, run_dir=first_free(lab.run_dir))
watch = health.Watch(trainer.model, trainer.optimizers, trainer.n_steps)
run = live.LiveRun(trainer, watch=watch, acts=runs_05.ACTS).start()
---
summary = await run.finished()
---
print("after:", summary["status"])"""
PICTURE = "img[alt^='Step ']"


def step(page: Page) -> int:
    found = re.search(r"step (\d+)/20000", page.inner_text(".jp-Notebook"))
    return int(found[1]) if found else 0


def drawn(page: Page) -> int:
    """The step of the picture that is seen; there must not be two."""
    seen = [picture for picture in page.locator(PICTURE).all() if picture.is_visible()]
    assert len(seen) <= 1
    return int(re.match(r"Step (\d+)", seen[0].get_attribute("alt"))[1]) if seen else 0


def sabotage(page: Page) -> None:
    """The button acts, a second watch begins, and what it finds stands in red, with its step."""
    page.click("button.jupyter-button:has-text('parameters to bf16')")
    line = page.locator("strong[style*='color']", has_text="error: lost_updates").first
    wait_for(lambda: line.count() and line.is_visible(), "the failure is not found", 60)
    assert re.search(r"watch since step \d+: error: lost_updates at step \d+", line.inner_text())
    colour = line.evaluate("node => getComputedStyle(node).color")  # mixed with the page's ink
    red, green, blue = map(float, re.findall(r"[\d.]+", colour)[:3])
    assert red > 4 * green > 0 and green == blue, colour
    assert re.search(r"parameters to bf16 at step \d+", page.locator(PICTURE).first.get_attribute("alt"))


def narrow(page: Page) -> None:
    """On a small page no button's words are cut, and the slider can be moved."""
    page.set_viewport_size({"width": 800, "height": 1600})
    cut = "buttons => buttons.filter(b => b.scrollWidth > b.clientWidth).map(b => b.textContent)"
    wait_for(lambda: page.locator(".noUi-base").first.bounding_box()["width"] > 80, "the slider has no length")
    assert page.locator("button.jupyter-button").evaluate_all(cut) == []
    page.set_viewport_size({"width": 1200, "height": 1600})


def save(page: Page, path: Path) -> None:
    """Not before the picture that stays is drawn: what is saved in a run's first seconds says that nothing is to be seen yet."""
    page.wait_for_selector(f"[class^='moe-still'] {PICTURE}", state="attached", timeout=60000)
    written = path.stat().st_mtime_ns
    command(page, "docmanager:save")
    wait_for(lambda: path.stat().st_mtime_ns > written and "moe-still" in path.read_text(), "it is not saved")


def open_page(page: Page, address: str) -> None:
    page.goto("about:blank")
    page.goto(f"{address}/doc/tree/live.ipynb?reset")


@pytest.mark.timeout(300)
def test_a_run_outlives_reload_rerun_and_kernel(tmp_path: Path) -> None:
    cells = CELLS.format(run_dir=str(tmp_path / "run"), notebooks=str(ROOT / "notebooks")).split("\n---\n")
    write_notebook(tmp_path / "live.ipynb", *cells)
    with jupyter_lab(tmp_path) as address, browser_page() as (page, crashes):
        open_page(page, address)
        run_all(page)
        page.wait_for_selector(PICTURE, timeout=60000)
        wait_for(lambda: drawn(page) > 5, "the picture does not move")
        sabotage(page)
        page.screenshot(path=tmp_path / "sabotaged.png")
        narrow(page)

        save(page, tmp_path / "live.ipynb")
        open_page(page, address)
        page.wait_for_selector("button.jupyter-button:has-text('Stop')", timeout=60000)
        before = drawn(page)
        wait_for(lambda: drawn(page) > before, "after a reload the picture stands still")
        page.screenshot(path=tmp_path / "reloaded.png")

        page.locator(".jp-CodeCell .jp-InputArea-editor").nth(1).click()
        page.keyboard.press("Shift+Enter")  # the wait is not over: JupyterLab clears the output and queues the cell
        wait_for(lambda: (tmp_path / "run_2" / "record.jsonl").exists(), "the run before does not make way")
        assert '"interrupted"' in (tmp_path / "run" / "summary.json").read_text()
        page.wait_for_selector("button.jupyter-button:has-text('Stop')", timeout=40000)
        wait_for(lambda: drawn(page) > 5, "the second run is not seen")

        save(page, tmp_path / "live.ipynb")
        command(page, "kernelmenu:shutdown")
        open_page(page, address)
        page.wait_for_selector(PICTURE, timeout=60000)
        page.wait_for_function(READY, timeout=40000)
        page.wait_for_timeout(1500)
        page.screenshot(path=tmp_path / "dead.png")
        assert drawn(page) > 0
        wait_for(lambda: "Loading widget" not in page.inner_text(".jp-Notebook"), "a widget loads for ever")
        assert not re.search("Error displaying|model not found", page.inner_text(".jp-Notebook"))
        assert not crashes
