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

import pytest
from playwright.sync_api import Page, Playwright, TimeoutError, sync_playwright

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
# JupyterLab shows "idle" before a kernel exists and then drops "run all", so the session itself is asked
READY = """() => { const w = window.jupyterapp && window.jupyterapp.shell.currentWidget;
  const k = w && w.sessionContext && w.sessionContext.session && w.sessionContext.session.kernel;
  return !!k && k.status === 'idle' && k.connectionStatus === 'connected'
         && w.context.isReady && w.sessionContext.isReady; }"""
OPTIONS = "--no-browser --allow-root --ip=127.0.0.1 --ServerApp.port_retries=0 --LabApp.news_url=None "
OPTIONS += "--IdentityProvider.token= --ServerApp.password= --LabApp.expose_app_in_browser=True "
OPTIONS += "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"


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
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
    places = {f"JUPYTER{'' if name.startswith('LAB') else '_'}{name}": str(folder / f".{name}") for name in names}
    quiet = folder / ".LAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_LAB", "PYTEST", "JPY"))} | places
    command = [sys.executable, "-m", "jupyterlab", f"--port={port}", f"--ServerApp.root_dir={folder}", *OPTIONS.split()]
    with (folder / "server.log").open("w") as log:
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
def browser_page() -> Iterator[tuple[Page, list[str]]]:
    """An empty page, and the errors of what it shows so far."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(playwright), args=ARGS, headless=True)
        page = browser.new_page(viewport={"width": 1200, "height": 1600})
        crashes: list[str] = []
        page.on("pageerror", lambda error: crashes.append(str(error)))
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
        time.sleep(0.05)


def command(page: Page, name: str) -> None:
    """One of JupyterLab's commands, which is not waited for."""
    page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)


def run_all(page: Page) -> None:
    """Ask until a prompt shows that a cell runs or ran: a request that comes before the kernel is ready is dropped."""
    page.wait_for_function(READY, timeout=40000)
    for _ in range(5):
        command(page, "notebook:run-all-cells")
        with contextlib.suppress(TimeoutError):
            page.wait_for_selector(".jp-InputPrompt:text-matches('[*]|[0-9]')", timeout=3000)
            return
    pytest.fail("JupyterLab does not run the cells")
