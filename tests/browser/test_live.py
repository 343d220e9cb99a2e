"""The dashboard in a real JupyterLab and a real browser: every button, and what a saved notebook still shows.

It needs chromium (Debian: `apt-get install chromium fonts-dejavu-core`; anywhere: `playwright install chromium`) and
fails without it: the behaviour of buttons while a cell waits changed in most releases of ipykernel 7.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import TimeoutError, sync_playwright

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# JupyterLab shows "idle" before a kernel exists and then drops "run all", so the session itself is asked
READY = """() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget;
  const k = w && w.sessionContext && w.sessionContext.session && w.sessionContext.session.kernel;
  return !!k && k.status === 'idle' && k.connectionStatus === 'connected'
         && w.context.isReady && w.sessionContext.isReady; }"""
COMMAND = "name => { window.jupyterapp.commands.execute(name); }"
CELLS = """from moe_lab import Trainer
from moe_lab.show.live import LiveRun
from moe_lab.study import notebook
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


def find_chromium(playwright) -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if Path(playwright.chromium.executable_path).exists():
        return playwright.chromium.executable_path
    pytest.fail("no chromium: `apt-get install chromium` or `playwright install chromium`, then run this test again")


@contextlib.contextmanager
def jupyter_lab(folder: Path):
    """A server of its own on a free port, with its own settings; yields its address and kills it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {f"JUPYTER_{name}_DIR": str(folder / f".{name}") for name in ("CONFIG", "DATA", "RUNTIME")}
    settings = folder / ".settings"
    quiet = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_LAB", "PYTEST", "JPY"))}
    environment |= places | {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTERLAB_WORKSPACES_DIR": str(folder / ".ws")}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    options += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--ServerApp.password="]
    options += ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    options += ["--LabApp.expose_app_in_browser=True"]
    with (folder / "server.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(f"{address}/api"), f"JupyterLab does not answer; see {folder}/server.log", 40)
            yield address
        finally:
            server.send_signal(signal.SIGTERM)  # it ends its kernels
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition, message: str, timeout_s: float = 15) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.1)


def open_notebook(page, address: str) -> None:
    page.goto(f"{address}/doc/tree/live.ipynb?reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=40000)
    page.wait_for_function(READY, timeout=40000)


def run_all(page) -> None:
    """Ask until a prompt shows that a cell runs or ran: a request that comes before the kernel is ready is dropped."""
    for _ in range(5):
        page.evaluate(COMMAND, "notebook:run-all-cells")
        with contextlib.suppress(TimeoutError):
            page.wait_for_selector(".jp-InputPrompt:text-matches('[*]|[0-9]')", timeout=3000)
            return
    pytest.fail("JupyterLab does not run the cells")


def click(page, text: str) -> None:
    page.click(f"button.jupyter-button:has-text('{text}')")


@pytest.mark.timeout(120)
def test_buttons_work_while_a_cell_waits_and_the_saved_notebook_stays_readable(tmp_path: Path) -> None:
    cells = [
        nbformat.v4.new_code_cell(source) for source in CELLS.format(run_dir=str(tmp_path / "run")).split("\n---\n")
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = tmp_path / "live.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), notebook)
    with sync_playwright() as playwright, jupyter_lab(tmp_path) as address:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=ARGS, headless=True)
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        crashes = []
        page.on("pageerror", lambda error: crashes.append(str(error)))
        open_notebook(page, address)
        run_all(page)
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
        assert time.monotonic() - clicked < 8
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
        browser.close()
