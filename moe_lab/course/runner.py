"""Execute notebooks without a person: one of them, or the whole sequence.

The first Ctrl-C goes to the cell that runs, so that a training saves its checkpoint, and ends the notebook after that
cell; a second one ends it at once.
"""

import ast
import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import papermill
import psutil
import zmq
from nbclient.exceptions import DeadKernelError
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from moe_lab.config import ROOT
from moe_lab.course.notebook import KINDS, Lab, cast, new_run_dir, refuse_unknown, resolve
from moe_lab.health.findings import counts
from moe_lab.sections import ConfigError
from moe_lab.train import RunError
from moe_lab.train.record import RECORD

NOTEBOOKS = ROOT / "notebooks"


def execute(path: Path, output: Path, parameters: Mapping[str, Any], **environment: str) -> None:
    """Run the notebook by papermill in this Python, in this `environment`; what its cells write to stderr (progress) is
    shown as it comes. Everything up to the cell that did not pass is in `output`. Raises RunError, one line, where a
    cell fails or the kernel dies, and KeyboardInterrupt after a Ctrl-C."""
    stopping = False

    def interrupt(*_: Any) -> None:
        """Pass Ctrl-C on: a kernel has a session of its own, so that the terminal's signal does not reach it."""
        nonlocal stopping
        kernels = psutil.Process().children()
        if stopping or not kernels:
            raise KeyboardInterrupt
        stopping = True
        print("\nstopping after this cell; press Ctrl-C again to quit at once", file=sys.stderr)
        for kernel in kernels:
            kernel.send_signal(signal.SIGINT)

    def before_cell(**_: Any) -> None:
        if stopping:
            raise KeyboardInterrupt

    encryption = "auto" if zmq.has("curve") else "disabled"  # where there is none, ipykernel warns in every run
    options = {"progress_bar": sys.stderr.isatty(), "stderr_file": sys.stderr, "on_cell_start": before_cell}
    options |= {"kernel_name": "python3", "cwd": path.parent}
    options["config"] = Config(KernelManager={"transport_encryption": encryption})
    handler = signal.signal(signal.SIGINT, interrupt)
    try:
        with patch.dict(os.environ, {"MOE_LAB_INTERACTIVE": "0", **environment}):
            papermill.execute_notebook(path, output, dict(parameters), **options)
    except PapermillExecutionError as error:
        if stopping:  # the cell that was interrupted had no way of its own to stop
            raise KeyboardInterrupt from error
        last = (str(error.evalue).strip().splitlines() or [""])[-1]
        raise RunError(f"{path.name}, cell [{error.exec_count}]: {error.ename}: {last}") from error
    except DeadKernelError as error:
        raise RunError(f"{path.name}: the kernel died; most often the machine ran out of memory") from error
    finally:
        signal.signal(signal.SIGINT, handler)


def declared_parameters(path: str | Path) -> dict[str, Any]:
    """Name → default of the cell tagged `parameters`. Raises ConfigError if the notebook cannot be read."""
    try:
        found = papermill.inspect_notebook(str(path))
    except (OSError, ValueError) as error:  # a file that is no notebook is a ValueError too
        raise ConfigError(f"{path}: not a notebook that can be read: {str(error).splitlines()[0]}") from None
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}


def validate_parameters(notebook_path: str | Path, parameters: Mapping[str, Any]) -> tuple[dict[str, Any], Lab]:
    """Parameters for papermill, of the notebook's names and types, and what they mean. Raises ConfigError."""
    defaults = declared_parameters(notebook_path)
    refuse_unknown(parameters, defaults, f"{Path(notebook_path).name}: ")
    kinds = {name: type(default) for name, default in defaults.items()} | KINDS
    values = {n: value if value in (None, "") else cast(n, value, kinds[n]) for n, value in parameters.items()}
    return values, resolve(**{name: value for name, value in (defaults | values).items() if name in KINDS})


def run_notebook(
    path: str | Path, parameters: Mapping[str, Any] | None = None, run_dir: str | Path | None = None
) -> Path:
    """Validate, execute, convert, and say where things are: in one directory (given, or new and dated), which is
    returned. Raises ConfigError before a kernel starts, else as `execute`."""
    path = find_notebook(path)
    parameters, lab = validate_parameters(path, parameters or {})
    directory = ROOT / run_dir if run_dir else lab.run_dir
    if (directory / RECORD).exists() and not lab.resume:  # before its notebook is written over
        raise ConfigError(f"{directory}: holds a run already; go on with resume=true, or take another run_dir")
    if "run_dir" in declared_parameters(path):
        parameters["run_dir"] = str(directory)
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / path.name
    print(f"{path.stem} …", file=sys.stderr, flush=True)
    try:
        execute(path, output, parameters)
    finally:
        if output.exists():
            write_html(output)
        print_end(output, parameters)
    return directory


def write_html(path: Path) -> None:
    """The page of an executed notebook, without the progress lines that it wrote to stderr: they stand there in red."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    html, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    path.with_suffix(".html").write_text(html, encoding="utf-8")


def print_end(output: Path, parameters: Mapping[str, Any]) -> None:
    """Where things are, how the run ended, what its watch found, and how to go on: a few aligned lines."""
    summary = output.with_name("summary.json")
    checkpoints = sorted((output.parent / "checkpoints").glob("*.pt"))
    files = [("notebook", output), ("HTML", output.with_suffix(".html"))]
    files += [*(("checkpoint", path) for path in checkpoints), ("summary", summary)]
    for label, path in files:
        if path.exists():
            print(f"{label:16}{path}")
    values = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    for key in ("status", "validation_loss", "trigram_loss", "bits_per_byte"):
        if key in values:
            value = values[key]
            print(f"{key.replace('_', ' '):16}{f'{value:.4f}' if isinstance(value, float) else value}")
    findings = values.get("findings")
    if findings is not None:
        print(f"{'findings':16}{counts(finding['severity'] for finding in findings)}")
    for finding in findings or ():
        print(f"{finding['severity']:16}{finding['rule']} at step {finding['step']}: {finding['where']}")
    if values.get("status") == "interrupted":
        given = {**parameters, "run_dir": output.parent, "resume": "true"}
        for name, value in given.items():
            given[name] = " ".join(value) if isinstance(value, list) else "" if value is None else value
        words = shlex.join(f"{name}={value}" for name, value in given.items())
        print(f"{'to go on':16}python -m moe_lab notebook {output.stem} {words}")


def find_notebook(path: str | Path) -> Path:
    """A notebook by its path (from here or from the repository's root), its name, or its number."""
    known = ", ".join(notebook.stem for notebook in all_notebooks())
    numbered = NOTEBOOKS.glob(f"{path}_*.ipynb") if str(path).isalnum() else ()
    for candidate in (Path(path), ROOT / path, NOTEBOOKS / path, NOTEBOOKS / f"{path}.ipynb", *numbered):
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
    refuse_unknown(parameters, list(chain(*declared.values())))
    parent = new_run_dir("notebooks")
    for path, names in declared.items():
        run_notebook(path, {name: value for name, value in parameters.items() if name in names}, parent / path.stem)
    print(parent)
