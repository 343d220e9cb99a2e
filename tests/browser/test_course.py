"""`make lab` in a real browser: it lands on the first notebook, a question waits for a click, and nothing that a reader does
touches a tracked file."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import write_notebook
from lab import browser_page, command, run_all, wait_for
from playwright.sync_api import Page

from moe_lab.config import ROOT

QUESTIONS = """from moe_lab.course.lessons import Question
OPTIONS = {"it falls & rises": lambda m: m["x"] == 0, "it stays": lambda m: m["x"] == 1, "it rises": lambda m: m["x"] == 2}
one, two, three = (Question(f"What does <{n}> do?", OPTIONS, f"because of {n}") for n in ("one", "two", "three"))
"""
CELLS = """from checks import questions_99
from moe_lab.course.lessons import ask, reveal, score
---
await ask(questions_99.one)
---
print("after", 1)
---
await ask(questions_99.two)
---
await ask(questions_99.three)
---
for question in (questions_99.one, questions_99.two, questions_99.three):
    reveal(question, x=1)
---
score()"""
PATH = "() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget; return w && w.context && w.context.path }"
GROUP = ".moe-lab-options[role=group]"  # a question's buttons
DIRTY = "() => window.jupyterapp.shell.currentWidget.context.model.dirty"


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.email=a@b", "-c", "user.name=a"]
    return subprocess.check_output(["git", *identity, *words], cwd=folder, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean checkout of what is here, so that no reader's own work/ is touched."""
    folder = tmp_path / "lab"
    for name in git(ROOT, "ls-files", "-co", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    return folder


@contextlib.contextmanager
def made_lab(checkout: Path) -> Iterator[str]:
    """`make lab`, with a browser that only writes down what it is asked to open; yields that address."""
    folder = checkout.parent
    (folder / "browser").write_text(f'#!/bin/sh\nprintf %s "$1" > {shlex.quote(str(folder / "address"))}\n')
    (folder / "browser").chmod(0o755)
    given = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_LAB", "PYTEST", "JPY", "JUPYTER"))}
    given |= {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    given |= {"PYTHONPATH": str(checkout), "BROWSER": f"{folder / 'browser'} %s", "MOE_LAB_PROFILE": "smoke"}
    # the environment is this one: nothing is installed
    words = ["make", "-o", ".venv/installed", "lab", f"BIN={Path(sys.executable).parent}"]
    words.append("LAB=--LabApp.expose_app_in_browser=True --ip=127.0.0.1 --port=0")
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(words, stdout=log, stderr=log, env=given, cwd=checkout, start_new_session=True)
        try:
            address = folder / "address"
            wait_for(lambda: address.exists() and address.read_text(), f"no page is opened; see {log.name}", 60)
            yield address.read_text()
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # make and its JupyterLab, which ends its kernels
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)


def text(page: Page) -> str:
    return page.inner_text(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook")


@pytest.mark.timeout(280)
def test_make_lab_opens_copies_in_which_a_question_waits(checkout: Path) -> None:
    with made_lab(checkout) as address, browser_page() as (page, crashes):
        page.goto(address)
        page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=60000)
        wait_for(lambda: page.evaluate(PATH) == "work/00_start_here.ipynb", "it does not land on 00")
        run_first_cells(page)
        page.screenshot(path=checkout.parent / "landed.png")
        run_until_it_waits(page, checkout.parent)
        origin = page.evaluate("() => location.origin")
        for folder in ("configs", "docs", "notebooks"):  # the root is the repository's
            assert page.evaluate("async path => (await fetch(path)).status", f"{origin}/api/contents/{folder}") == 200
        assert "news" not in page.inner_text("body").lower(), "JupyterLab asks about its news"
        write_notebook(checkout / "work" / "ask.ipynb", *CELLS.split("\n---\n"))
        (checkout / "work" / "checks" / "questions_99.py").write_text(QUESTIONS)
        page.goto(f"{origin}/doc/tree/work/ask.ipynb?reset")
        run_all(page)
        answer_by_key_mouse_and_interrupt(page, checkout.parent)
        command(page, "docmanager:save")
        saved = checkout / "work" / "ask.ipynb"
        wait_for(lambda: "in all" in saved.read_text() or "1 of 2" in saved.read_text(), "the notebook was not saved")
        assert "jupyter.widget-view" not in saved.read_text(), "buttons stay in the saved file"
        run_again(page)
        assert git(checkout, "status", "--porcelain") == "" and not crashes


def run_first_cells(page: Page) -> None:
    """Opening leaves a copy unchanged; then its first cells run, and it is saved."""
    page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session", timeout=60000)
    time.sleep(2)
    assert page.evaluate(DIRTY) is False, "a copy that was only opened asks to be saved"
    page.locator(".jp-CodeCell").first.click()
    for _ in range(3):  # parameters, begin, provenance
        page.keyboard.press("Shift+Enter")
    wait_for(lambda: "profile smoke: " in text(page) and "commit " in text(page), "the copy does not run", 90)
    command(page, "docmanager:save")
    wait_for(lambda: page.evaluate(DIRTY) is False, "the copy was not saved")


def run_until_it_waits(page: Page, folder: Path) -> None:
    """Run All of the real notebook stops at its first question and, after a click, at its second."""
    run_all(page)
    options, waits = page.locator(f"{GROUP} button.jupyter-button"), "The notebook waits here for your choice"
    wait_for(lambda: options.count() > 2 and waits in text(page), "Run All does not stop at the first question", 90)
    assert "measured: " not in text(page)
    first = page.locator(GROUP).get_attribute("aria-label")
    options.first.click()
    wait_for(lambda: re.search("✓ as you predicted|✗ you predicted: ", text(page)), "a click does not go on")
    wait_for(lambda: options.count() > 2, "it does not stop at the second question")
    wait_for(lambda: (page.locator(GROUP).get_attribute("aria-label") or first) != first, "the same question")
    page.locator(GROUP).scroll_into_view_if_needed()
    page.screenshot(path=folder / "second_question.png")
    assert page.locator("details:not([open])").count(), "no answer is folded"


def answer_by_key_mouse_and_interrupt(page: Page, folder: Path) -> None:
    group = page.locator(GROUP)
    option = "button.jupyter-button:has-text('{}')"
    page.wait_for_selector(option.format("it stays"), timeout=60000)
    wait_for(lambda: group.count() == 1 and group.get_attribute("aria-label") == "What does <one> do?", "no name")
    time.sleep(1)
    assert "after 1" not in text(page) and "The notebook waits here for your choice" in text(page)
    page.screenshot(path=folder / "waiting.png")
    labels = [button.inner_text() for button in page.locator("button.jupyter-button").all()]
    assert sorted(labels) == ["I'd rather not guess", "it falls & rises", "it rises", "it stays"]
    page.locator("button.jupyter-button").first.focus()
    for _ in range(labels.index("it stays")):
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    wait_for(lambda: "after 1" in text(page), "a key does not answer")
    wait_for(lambda: group.count() == 1 and "<two>" in (group.get_attribute("aria-label") or ""), "no second question")
    page.click(option.format("it rises"))
    wait_for(lambda: group.count() == 1 and "<three>" in (group.get_attribute("aria-label") or ""), "no third question")
    command(page, "notebook:interrupt-kernel")
    wait_for(lambda: "predictions were right" in text(page), "Interrupt does not go on")
    page.screenshot(path=folder / "revealed.png")
    shown = text(page)
    for line in ("going on without a guess", "✓ as you predicted", "✗ you predicted: it rises", "you did not guess"):
        assert shown.count(line) == 1, line
    assert "because of one" in shown and "1 of 2 predictions were right" in shown
    assert not page.locator("button.jupyter-button").count()


def run_again(page: Page) -> None:
    """Another kernel: what was answered is kept, and only what was not answered waits."""
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    time.sleep(1)
    run_all(page)
    wait_for(lambda: "Your last answer: it rises" in text(page), "the answers are forgotten", 60)
    page.click("[aria-label*=three] button:has-text('it stays')")
    wait_for(
        lambda: "2 of 3 predictions were right" in text(page), "the third question does not wait, or is not scored"
    )
