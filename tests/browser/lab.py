"""A JupyterLab and a browser for tests: a server of its own, a notebook opened in it, its cells run.

It needs chromium (Debian: `apt-get install chromium fonts-dejavu-core`; anywhere: `playwright install chromium`).
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Page, Playwright, TimeoutError, sync_playwright

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# JupyterLab shows "idle" before a kernel exists and then drops "run all", so the session itself is asked
READY = """() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget;
  const k = w && w.sessionContext && w.sessionContext.session && w.sessionContext.session.kernel;
  return !!k && k.status === 'idle' && k.connectionStatus === 'connected'
         && w.context.isReady && w.sessionContext.isReady; }"""
COMMAND = "name => { window.jupyterapp.commands.execute(name); }"


def find_chromium(playwright: Playwright) -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if Path(playwright.chromium.executable_path).exists():
        return playwright.chromium.executable_path
    pytest.fail("no chromium: `apt-get install chromium` or `playwright install chromium`, then run this test again")


@contextlib.contextmanager
def jupyter_lab(folder: Path) -> Iterator[str]:
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


@contextlib.contextmanager
def opened_notebook(notebook: str, address: str, height: int) -> Iterator[tuple[Page, list[str]]]:
    """A notebook of the server's folder open in a browser, its cells running: the page, and its errors so far."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=ARGS, headless=True)
        page = browser.new_page(viewport={"width": 1200, "height": height})
        crashes: list[str] = []
        page.on("pageerror", lambda error: crashes.append(str(error)))
        open_notebook(page, address, notebook)
        run_all(page)
        yield page, crashes
        browser.close()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], message: str, timeout_s: float = 45) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, message
        time.sleep(0.1)


def write_notebook(path: Path, cells: list[str]) -> None:
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    code = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=metadata), path)


def open_notebook(page: Page, address: str, name: str) -> None:
    """Open a notebook of the server's folder and wait for its kernel."""
    page.goto(f"{address}/doc/tree/{name}?reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook", timeout=40000)
    page.wait_for_function(READY, timeout=40000)


def run_all(page: Page) -> None:
    """Ask until a prompt shows that a cell runs or ran: a request that comes before the kernel is ready is dropped."""
    for _ in range(5):
        page.evaluate(COMMAND, "notebook:run-all-cells")
        with contextlib.suppress(TimeoutError):
            page.wait_for_selector(".jp-InputPrompt:text-matches('[*]|[0-9]')", timeout=3000)
            return
    pytest.fail("JupyterLab does not run the cells")
