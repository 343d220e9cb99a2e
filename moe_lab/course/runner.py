"""Execute notebooks without a person: one of them, or the whole sequence.

    python -m moe_lab notebook notebooks/05_fixed_training.ipynb profile=smoke      # or -p profile smoke
    python -m moe_lab notebook all profile=smoke             # each into a folder of one new directory under runs/

The first Ctrl-C goes to the cell that runs, so that a training run saves its checkpoint, and ends the notebook after
that cell; a second one ends it at once.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import papermill
import zmq
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from moe_lab.config import ROOT, ConfigError, suggestion
from moe_lab.course.notebook import KINDS, WORDS, Lab, cast, new_run_dir, resolve
from moe_lab.train import RunError
from moe_lab.train.record import RECORD

NOTEBOOKS = ROOT / "notebooks"


class Kernel(AsyncKernelManager):
    """papermill makes its own kernel manager; this one lets itself be found, for Ctrl-C: the kernel has a session of its
    own, so that the terminal's signal does not reach it."""

    running: ClassVar[Kernel | None] = None
    stopping: ClassVar[bool] = False  # Ctrl-C was pressed

    def __init__(self, *args: Any, **options: Any) -> None:
        # without encryption ipykernel warns, in every run
        encryption = "auto" if zmq.has("curve") else "disabled"
        super().__init__(*args, **{"transport_encryption": encryption} | options)
        Kernel.running = self

    @staticmethod
    def interrupt(number: int, frame: Any) -> None:
        kernel = Kernel.running
        if Kernel.stopping or kernel is None or kernel.provisioner is None:
            raise KeyboardInterrupt
        Kernel.stopping = True
        print("\nstopping after this cell; press Ctrl-C again to quit at once", file=sys.stderr)
        os.kill(kernel.provisioner.pid, signal.SIGINT)

    @staticmethod
    def before_cell(**_: Any) -> None:
        if Kernel.stopping:
            raise KeyboardInterrupt


def execute(path: Path, output: Path, parameters: Mapping[str, Any], **environment: str) -> None:
    """Run the notebook by papermill in this Python; what its cells write to stderr (progress) is shown as it comes.
    `environment` is the kernel's, for the time of this execution.

    Everything up to the cell that did not pass is in `output`. Raises RunError, one line, where a cell fails or the
    kernel dies, and KeyboardInterrupt after a Ctrl-C.
    """
    Kernel.running, Kernel.stopping = None, False
    before = dict(os.environ)
    os.environ.update({"MOE_LAB_INTERACTIVE": "0", **environment})
    handler = signal.signal(signal.SIGINT, Kernel.interrupt)
    try:
        papermill.execute_notebook(
            path,
            output,
            parameters=dict(parameters),
            kernel_name="python3",
            cwd=path.parent,
            progress_bar=sys.stderr.isatty(),
            stderr_file=sys.stderr,
            kernel_manager_class=Kernel,
            on_cell_start=Kernel.before_cell,
        )
    except PapermillExecutionError as error:
        if Kernel.stopping:  # the cell that was interrupted had no way of its own to stop
            raise KeyboardInterrupt from error
        last = (str(error.evalue).strip().splitlines() or [""])[-1]
        raise RunError(f"{path.name}, cell [{error.exec_count}]: {error.ename}: {last}") from error
    except DeadKernelError as error:
        raise RunError(f"{path.name}: the kernel died; most often the machine ran out of memory") from error
    finally:
        signal.signal(signal.SIGINT, handler)
        os.environ.clear()
        os.environ.update(before)


def declared_parameters(path: str | Path) -> dict[str, tuple[type | None, Any]]:
    """Name → (type, default) of the cell tagged `parameters`; the type is None where neither annotation nor default
    tells it. Raises ConfigError if the notebook cannot be read."""
    try:
        found = papermill.inspect_notebook(str(path))
    except (OSError, ValueError) as error:  # a file that is no notebook is a ValueError too
        raise ConfigError(f"{path}: not a notebook that can be read: {str(error).splitlines()[0]}") from None
    kinds = {kind.__name__: kind for kind in WORDS}
    defaults = {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}
    noted = {name: parameter["inferred_type_name"] for name, parameter in found.items()}  # "None": no annotation
    return {name: (kinds.get(noted[name], kinds.get(type(value).__name__)), value) for name, value in defaults.items()}


def validate_parameters(notebook_path: str | Path, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], Lab]:
    """Parameters for papermill: names known to the notebook, values of its types; and the config and the run that they mean.

    Raises ConfigError before a kernel starts. A parameter that is None is passed on as it is.
    """
    declared = declared_parameters(notebook_path)
    values = {}
    for name, value in parameters.items():
        if name not in declared:
            near = suggestion(name, declared) or (f"; it has {', '.join(declared)}" if declared else "; it has none")
            raise ConfigError(f"{Path(notebook_path).name}: unknown parameter {name!r}{near}")
        kind = KINDS.get(name) or declared[name][0]
        values[name] = value if value in (None, "") or kind is None else cast(name, value, kind)
    given = {name: default for name, (_, default) in declared.items()} | values
    return values, resolve(**{name: value for name, value in given.items() if name in KINDS})


def run_notebook(
    path: str | Path, parameters: Mapping[str, Any] | None = None, run_dir: str | Path | None = None
) -> Path:
    """Validate, execute, convert, and say where things are. The executed notebook, its HTML and the run's own files lie in
    one directory (given, or new and dated), which is returned.

    Raises ConfigError before a kernel starts, else as `execute`.
    """
    path = find_notebook(path)
    parameters, lab = validate_parameters(path, parameters or {})
    directory = ROOT / run_dir if run_dir else lab.run_dir
    if (directory / RECORD).exists() and not lab.resume:  # before its notebook is written over
        raise ConfigError(f"{directory}: holds a run already; go on with resume=true, or take another run_dir")
    if "run_dir" in declared_parameters(path):
        parameters["run_dir"] = str(directory)
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / path.name
    try:
        execute(path, output, parameters)
    finally:
        if output.exists():
            html, _ = HTMLExporter().from_filename(str(output))
            output.with_suffix(".html").write_text(html, encoding="utf-8")
        print_files(output)
    return directory


def print_files(output: Path) -> None:
    """Where things are and how the run ended, in a few aligned lines."""
    summary = output.with_name("summary.json")
    lines = [("notebook", output), ("HTML", output.with_suffix(".html"))]
    lines += [("checkpoint", path) for path in sorted((output.parent / "checkpoints").glob("*.pt"))]
    lines = [(label, path) for label, path in [*lines, ("summary", summary)] if path.exists()]
    values = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    for key in (key for key in ("status", "validation_loss", "trigram_loss", "bits_per_byte") if key in values):
        value = values[key]
        lines.append((key.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else value))
    for label, value in lines:
        print(f"{label:16}{value}")


def find_notebook(path: str | Path) -> Path:
    """A notebook by its path (from here or from the repository's root) or its name."""
    known = ", ".join(notebook.stem for notebook in all_notebooks())
    for candidate in (Path(path), ROOT / path, NOTEBOOKS / path, NOTEBOOKS / f"{path}.ipynb"):
        if candidate.is_file():
            return candidate.resolve()
    raise ConfigError(f"{path}: no such notebook; there are {known}")


def all_notebooks() -> list[Path]:
    """Raises ConfigError where there are none."""
    if paths := sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        return paths
    raise ConfigError(f"{NOTEBOOKS}: no notebooks; an installed package has none: run this in a clone")


def run_all(parameters: Mapping[str, Any]) -> None:
    """Run the notebooks in order, each in a folder of one new directory, up to the first failure, which is raised.
    `parameters` reach the notebooks that have them."""
    declared = {path: declared_parameters(path) for path in all_notebooks()}
    known = {name for names in declared.values() for name in names}
    for name in parameters:
        if name not in known:
            raise ConfigError(f"unknown parameter {name!r}{suggestion(name, known)}")
    parent = new_run_dir("notebooks")
    for path, names in declared.items():
        print(f"{path.stem} …", file=sys.stderr, flush=True)
        run_notebook(path, {name: value for name, value in parameters.items() if name in names}, parent / path.stem)
    print(parent)
