"""What the first cells of a notebook call, and notebooks executed without a person."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from helpers import refused, write_notebook

from benchmarks import outputs
from moe_lab.__main__ import main
from moe_lab.config import ConfigError
from moe_lab.course import runner

TESTS = Path(__file__).parent
PARAMETERS = """profile: str = "smoke"  # smoke, lab or gpu
overrides: list = []
run_dir: str = ""
resume: bool = False
n_seeds: int = 3  # seeds a method
lr: float = 0.01"""
IMPORTS = f"""import sys
sys.path.insert(0, {str(TESTS / "browser")!r})
from fake_trainer import FakeTrainer
from moe_lab.show.live import LiveRun"""
START = "run = LiveRun(FakeTrainer({})).start()"


def write(path: Path, *sources: str) -> Path:
    notebook = write_notebook(path, PARAMETERS, *sources)
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def test_parameters_are_cast_to_what_the_notebook_declares(tmp_path) -> None:
    path = write(tmp_path / "n.ipynb")
    given = {"resume": "false", "lr": "1e-3", "n_seeds": "2", "overrides": "training.steps=3"}
    expected = {"resume": False, "lr": 0.001, "n_seeds": 2, "overrides": ["training.steps=3"]}
    assert runner.validate_parameters(path, given)[0] == expected


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_seed": 2}, "n.ipynb: unknown parameter 'n_seed'; did you mean n_seeds?"),
        ({"zzz": 2}, "n.ipynb: unknown parameter 'zzz'; known are profile, overrides"),
        ({"resume": "nay"}, "parameter resume='nay' must be true or false"),
        ({"n_seeds": "1e-3"}, "parameter n_seeds=0.001 must be a whole number"),
        ({"overrides": "model.n_layers=0"}, "model.n_layers=0 must be more than 0"),
    ],
    ids=str,
)
def test_wrong_parameters_stop_before_a_kernel_starts(tmp_path, parameters, message, capsys) -> None:
    path = write(tmp_path / "n.ipynb")
    with refused(ConfigError, match=re.escape(message)):
        runner.validate_parameters(path, parameters)
    arguments = [f"{name}={value}" for name, value in parameters.items()]
    assert main(["notebook", str(path), *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("word", ["05", "all", str(runner.NOTEBOOKS / "00_start_here.ipynb")])
def test_where_no_notebooks_are_installed_one_line_says_so(word, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path)
    assert main(["notebook", word]) == 2
    assert re.fullmatch(r"error: .+: no notebooks; an installed package has none: .+ clone\n", capsys.readouterr().err)


def test_a_package_that_notebooks_need_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "papermill", None)  # importing it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "moe_lab.course.runner")
    monkeypatch.delattr("moe_lab.course.runner")
    assert main(["notebook", "05"]) == 2
    assert re.fullmatch("error: notebooks need papermill; .+\n", capsys.readouterr().err)


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> tuple[int, str, Path]:
    """The exit code, the last line on stderr and the directory of a notebook whose second run fails."""
    folder = tmp_path_factory.mktemp("failed")
    cells = [START.format(""), "summary = await run.finished()", "print(resume, lr)"]
    cells += [START.format("fails_at=5"), "await run.finished()", "print('never')"]
    path, err = write(folder / "n.ipynb", IMPORTS, *cells), io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main(["notebook", str(path), "lr=1e-3", f"run_dir={folder / 'out'}"])
    return code, err.getvalue().splitlines()[-1], folder / "out"


@pytest.mark.parametrize("word", ["05", "05_fixed_training", "notebooks/05_fixed_training.ipynb"])
def test_a_notebook_is_found_by_number_name_or_path(word) -> None:
    assert runner.find_notebook(word) == runner.NOTEBOOKS / "05_fixed_training.ipynb"


@pytest.mark.parametrize("word", ["", "0", "5", "_fixed"])
def test_a_notebook_is_not_found_by_less(word) -> None:
    with refused(ConfigError, match="no such notebook; there are 00_start_here"):
        runner.find_notebook(word)


BEGIN = f"""import sys
sys.path.insert(0, {str(runner.ROOT)!r})
from moe_lab.course import notebook
lab = notebook.begin(profile=profile)"""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profil": "smoke"}, "error: unknown parameter 'profil'; did you mean profile?"),
        ({"profile": "smok"}, "error: profile='smok' is not one of smoke, lab, gpu; did you mean smoke?"),
    ],
    ids=str,
)
def test_plain_papermill_with_a_wrong_parameter_ends_in_one_line(tmp_path, given, message) -> None:
    """By its own Python call; what stands under the cell is what JupyterLab shows."""
    path = write(tmp_path / "n.ipynb", BEGIN, "print('trained')")
    with pytest.raises(papermill.PapermillExecutionError, match=re.escape(message.removeprefix("error: "))):
        papermill.execute_notebook(path, tmp_path / "out.ipynb", given, kernel_name="python3", progress_bar=False)
    *_, begin, never = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    (output,) = begin.outputs
    assert (output.output_type, output.traceback) == ("error", [message])
    assert not never.outputs


def test_plain_papermill_with_right_parameters_goes_on(tmp_path) -> None:
    path, right = write(tmp_path / "n.ipynb", BEGIN), {"profile": "smoke", "lr": 0.1}
    papermill.execute_notebook(path, tmp_path / "out.ipynb", right, kernel_name="python3", progress_bar=False)
    assert "profile smoke: " in (tmp_path / "out.ipynb").read_text()


def test_the_last_lines_name_what_was_found_and_how_to_go_on(tmp_path, capsys) -> None:
    found = [{"severity": "error", "rule": "lost_updates", "step": 20, "where": "final_norm.weight"}]
    found += [{"severity": "warning", "rule": "lr_too_low", "step": 20, "where": "adamw"}]
    (tmp_path / "summary.json").write_text(json.dumps({"status": "interrupted", "findings": found}))
    runner.print_end(tmp_path / "n.ipynb", {"profile": "smoke", "overrides": ["training.steps=60", "model.d_ff=64"]})
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        f"summary {tmp_path / 'summary.json'}",
        "status interrupted",
        "findings 1 error, 1 warning, 0 info",
        "error lost_updates at step 20: final_norm.weight",
        "warning lr_too_low at step 20: adamw",
        f"to go on python -m moe_lab notebook n profile=smoke 'overrides=training.steps=60 model.d_ff=64' "
        f"run_dir={tmp_path} resume=true",
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "findings": None}))  # nothing watched
    runner.print_end(tmp_path / "n.ipynb", {})
    assert "findings" not in (out := capsys.readouterr().out) and "to go on" not in out


def test_headless_leaves_one_picture_and_no_widget(failed) -> None:
    done = nbformat.read(failed[2] / "n.ipynb", as_version=4)
    start, wait, after = [cell for cell in done.cells if cell.cell_type == "code"][-6:-3]
    assert [sorted(output.data) for output in start.outputs] == [["text/html", "text/plain"]]
    assert start.outputs[0].data["text/plain"].startswith("Step 20 of 20")
    assert {output.name for output in wait.outputs} <= {"stderr"}
    assert after.outputs[0].text == "False 0.001\n"
    assert "widgets" not in done.metadata
    page = (failed[2] / "n.html").read_text()
    assert '<img alt="Step 20 of 20' in page and "<title>n</title>" in page
    assert "100 %" in wait.outputs[0].text and "100 %" not in page  # progress is no part of the report
    assert 'data-mime-type="application/vnd.jupyter.stderr"' in page, "the error itself stays"


def test_a_failing_worker_fails_the_cell_with_its_own_words(failed) -> None:
    code, last, directory = failed
    assert code == 2
    assert last == "error: n.ipynb, cell [8]: FloatingPointError: loss is nan in step 5"
    *_, bad, never = nbformat.read(directory / "n.ipynb", as_version=4).cells
    assert bad.outputs[-1].traceback[-1].endswith("loss is nan in step 5")
    assert not never.outputs


def test_a_directory_with_a_run_is_not_overwritten(tmp_path) -> None:
    (tmp_path / "record.jsonl").touch()
    with refused(ConfigError, match="holds a run already.*resume=true"):
        runner.run_notebook(write(tmp_path / "n.ipynb"), {}, tmp_path)


def test_ctrl_c_stops_the_run_gracefully_and_the_notebook_after_its_cell(tmp_path, capsys) -> None:
    mark = tmp_path / "waits"
    wait = f"""import asyncio, pathlib
asyncio.get_running_loop().call_soon(pathlib.Path({str(mark)!r}).touch)
print((await run.finished())['status'])"""
    path = write(tmp_path / "n.ipynb", IMPORTS, START.format("n_steps=10**6"), wait, "print('never')")

    def press() -> None:
        while not mark.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert main(["notebook", str(path), f"run_dir={tmp_path / 'out'}"]) == 130
    assert "stopping after this cell" in capsys.readouterr().err
    *_, wait_cell, never = nbformat.read(tmp_path / "out" / "n.ipynb", as_version=4).cells
    assert [output.text for output in wait_cell.outputs if output.get("name") == "stdout"] == ["interrupted\n"]
    assert not never.outputs


def test_refresh_writes_clean_outputs_in_place(tmp_path) -> None:
    profile = "import os, sys\nprint('x', file=sys.stderr)\nos.environ['MOE_LAB_PROFILE']"
    path = write(tmp_path / "n.ipynb", profile, "import ipywidgets\nipywidgets.IntSlider()")
    outputs.write_outputs(outputs.executed(path, "lab"), path)
    done = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in done.cells] == [1, 2, 3]
    assert [output.data["text/plain"] for output in done.cells[1].outputs] == ["'lab'"]
    assert not {"papermill", "widgets"} & set(done.metadata)
    assert all("papermill" not in cell.metadata for cell in done.cells)
    assert "widget-view" not in path.read_text()
