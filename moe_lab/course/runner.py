"""Execute notebooks without a person: one run, the whole sequence, or the committed outputs.

    python -m moe_lab notebook notebooks/05_fixed_training.ipynb profile=smoke      # or -p profile smoke
    runner.run_all()                                                                # the sequence, to the first failure
    runner.refresh(["notebooks/01_data_and_loss_floors.ipynb"])                     # the committed outputs, in place

The first Ctrl-C goes to the cell that runs, so that a training run saves its checkpoint, and ends the notebook after
that cell; a second one ends it at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import papermill
import zmq
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from moe_lab.config import ConfigError, suggestion
from moe_lab.course.notebook import ROOT, declared_parameters, new_run_dir, resolve, validate_parameters
from moe_lab.train.record import RECORD

NOTEBOOKS = ROOT / "notebooks"
MAX_BYTES = 500 * 1024  # of a committed notebook


class Interruption:
    """Ctrl-C while papermill runs. The kernel has a session of its own, so the terminal's signal does not reach it."""

    def __init__(self) -> None:
        self.asked, self.kernel = False, None
        interruption = self

        class Manager(AsyncKernelManager):
            """papermill makes its own kernel manager; this one lets itself be found."""

            def __init__(self, *args: Any, **options: Any) -> None:
                # without encryption ipykernel warns, in every run
                encryption = "auto" if zmq.has("curve") else "disabled"
                super().__init__(*args, **{"transport_encryption": encryption} | options)
                interruption.kernel = self

        self.manager_class = Manager

    def on_signal(self, number: int, frame: Any) -> None:
        if self.asked or self.kernel is None or self.kernel.provisioner is None:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this cell; press Ctrl-C again to quit at once", file=sys.stderr)
        os.kill(self.kernel.provisioner.pid, signal.SIGINT)

    def before_cell(self, **_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def headless(interruption: Interruption, **environment: str) -> Iterator[None]:
    """Environment of the kernel and handling of Ctrl-C, for the time of one execution."""
    environment = {"MOE_LAB_INTERACTIVE": "0", **environment}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    handler = signal.signal(signal.SIGINT, interruption.on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def execute(path: Path, output: Path, parameters: Mapping[str, Any], **environment: str) -> None:
    """Run the notebook by papermill in this Python; what its cells write to stderr (progress) is shown as it comes.

    Raises KeyboardInterrupt after a Ctrl-C, with everything up to the interrupted cell in `output`.
    """
    interruption = Interruption()
    with headless(interruption, **environment):
        try:
            papermill.execute_notebook(
                path,
                output,
                parameters=dict(parameters),
                kernel_name="python3",
                cwd=path.parent,
                progress_bar=sys.stderr.isatty(),
                stderr_file=sys.stderr,
                kernel_manager_class=interruption.manager_class,
                on_cell_start=interruption.before_cell,
            )
        except PapermillExecutionError as error:
            if interruption.asked:  # the cell that was interrupted had no way of its own to stop
                raise KeyboardInterrupt from error
            raise


def run_notebook(
    path: str | Path, parameters: Mapping[str, Any] | None = None, run_dir: str | Path | None = None
) -> Path:
    """Validate, execute, convert. The executed notebook, its HTML and the run's own files lie in one directory (given,
    or new and dated), which is returned.

    Raises ConfigError before a kernel starts, and PapermillExecutionError with the notebook written up to the failure.
    """
    path = find_notebook(path)
    parameters = validate_parameters(path, parameters or {})
    declared = declared_parameters(path)
    given = run_dir or parameters.get("run_dir")
    directory = ROOT / given if given else new_run_dir(profile_of(parameters))
    if (directory / RECORD).exists() and not parameters.get("resume"):  # before its notebook is written over
        raise ConfigError(f"{directory}: holds a run already; go on with resume=true, or take another run_dir")
    if "run_dir" in declared:
        parameters["run_dir"] = str(directory)
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / path.name
    try:
        execute(path, output, parameters)
    finally:
        if output.exists():
            html, _ = HTMLExporter().from_filename(str(output))
            output.with_suffix(".html").write_text(html, encoding="utf-8")
    return directory


def profile_of(parameters: Mapping[str, Any]) -> str:
    return resolve(**{name: value for name, value in parameters.items() if name in ("profile", "config")}).profile


def find_notebook(path: str | Path) -> Path:
    """A notebook by its path (from here or from the repository's root) or its name."""
    for candidate in (Path(path), ROOT / path, NOTEBOOKS / path, NOTEBOOKS / f"{path}.ipynb"):
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(f"{path}: no such notebook; there are {', '.join(p.stem for p in all_notebooks())}")


def all_notebooks() -> list[Path]:
    return sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))


def run_all(names: Iterable[str | Path] | None = None, parameters: Mapping[str, Any] | None = None) -> Path:
    """Run the notebooks in order, each in a folder of one new directory, up to the first failure, which is raised.
    `parameters` reach the notebooks that have them."""
    paths = all_notebooks() if names is None else [find_notebook(name) for name in names]
    known = {name for path in paths for name in declared_parameters(path)}
    for name in parameters or {}:
        if name not in known:
            raise ConfigError(f"unknown parameter {name!r}{suggestion(name, known)}")
    parent = new_run_dir("notebooks")
    for path in paths:
        print(f"{path.stem} …", file=sys.stderr, flush=True)
        known = {k: v for k, v in (parameters or {}).items() if k in declared_parameters(path)}
        report(run_notebook(path, known, parent / path.stem), path.name)
    return parent


def refresh(paths: Iterable[str | Path]) -> None:
    """Execute notebooks in profile lab and write their outputs in place: the one way to committed outputs.

    A notebook is written only if every cell passed. Progress and warnings on stderr are left out.
    """
    for path in map(find_notebook, paths):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / path.name
            execute(path, output, {}, MOE_LAB_PROFILE="lab")
            fresh = clean(nbformat.read(output, as_version=4))
        size = len(nbformat.writes(fresh).encode())
        if size > MAX_BYTES:
            raise ConfigError(
                f"{path.name}: {size // 1024} KiB of outputs; {MAX_BYTES // 1024} is the limit: thin its figures"
            )
        nbformat.write(fresh, path)
        print(f"{path.name}: {size // 1024} KiB")


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what papermill and widgets leave behind; execution counts 1 to n."""
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    for count, cell in enumerate(code, 1):
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    return notebook


def report(directory: Path, name: str) -> None:
    """Say where things are and how the run ended, in a few aligned lines."""
    lines = [("notebook", directory / name), ("HTML", (directory / name).with_suffix(".html"))]
    lines += [("checkpoint", path) for path in sorted((directory / "checkpoints").glob("*.pt"))]
    summary = directory / "summary.json"
    if summary.exists():
        lines.append(("summary", summary))
        values = json.loads(summary.read_text(encoding="utf-8"))
        keys = ("status", "validation_loss", "trigram_loss", "bits_per_byte")
        shown = {key: values.get(key) for key in keys}
        lines += [(k.replace("_", " "), f"{v:.4f}" if isinstance(v, float) else v) for k, v in shown.items()]
    for label, value in lines:
        if not isinstance(value, Path) or value.exists():
            print(f"{label:16}{value}")


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`PATH [-p NAME VALUE] [NAME=VALUE]` → the path and the parameters, still as text."""
    usage = "notebook PATH [-p NAME VALUE ...] [NAME=VALUE ...]"
    words, paths, parameters = list(arguments), [], {}
    while words:
        word = words.pop(0)
        if word == "-p" and len(words) >= 2:
            name, value = words.pop(0), words.pop(0)
            parameters[name] = value
        elif not word.startswith("-") and "=" in word:
            name, _, parameters[name] = word.partition("=")
        elif word.startswith("-") or paths:
            raise ConfigError(f"{word!r} is not understood; write: {usage}")
        else:
            paths.append(word)
    if not paths:
        raise ConfigError(f"no notebook is named; write: {usage}")
    return paths[0], parameters


def main(argv: Sequence[str]) -> int:
    """The command. 0: every cell passed; 2: wrong input; 1: a cell failed; 130: Ctrl-C. Errors are one line."""
    directory = name = None
    try:
        path, parameters = parse(argv)
        path = find_notebook(path)
        given = validate_parameters(path, parameters).get("run_dir")
        directory, name = ROOT / given if given else new_run_dir(profile_of(parameters)), path.name
        run_notebook(path, parameters, directory)
        code = 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        last = (str(error.evalue).strip().splitlines() or [""])[-1]
        print(f"error: {name}, cell [{error.exec_count}]: {error.ename}: {last}", file=sys.stderr)
        code = 2 if error.ename in ("ConfigError", "RunError") else 1
    except DeadKernelError:
        print(f"error: {name}: the kernel died; most often the machine ran out of memory", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    report(directory, name)
    return code
