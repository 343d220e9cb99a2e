"""Wrong input ends in one line that names it, exit code 2, and nothing written. Each test reads the line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_run import CONFIGS, contents, tiny

from moe_lab import Trainer
from moe_lab import __main__ as command_line
from moe_lab.__main__ import main
from moe_lab.config import ROOT, to_yaml


@pytest.fixture
def error(tmp_path: Path, capsys, monkeypatch):
    """Run a command that must fail, and return its line; `{dir}` in the expectation is the folder of the config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("training began"))

    def check(*argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["run", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return err.removeprefix("error: ").rstrip("\n").replace(str(tmp_path), "{dir}")

    return check


IN_A_FILE = {
    "bad YAML": ("model:\n  d_model: [1, 2\ntraining:\n", r", line 3: not valid YAML: expected ',' or '\]', but got ':'"),
    "a tab": ("model:\n\td_model: 3\n", r", line 2: not valid YAML: .*'\\t'.*"),
    "an object": ("a: !!python/object:os.system x\n", r", line 1: not valid YAML: could not determine a constructor.*"),
    "two documents": ("--- {}\n--- {}\n", r", line 2: not valid YAML: but found another document"),
    "a section twice": ("data: {}\nmodel: {}\ndata: {}\n", r", line 3: .* the key 'data' stands here and in line 1"),
    "a key twice": ("model:\n  d_ff: 1\n  d_ff: 2\n", r", line 3: .* the key 'd_ff' stands here and in line 2"),
    "an unknown key": ("training:\n  warmup: 3\n", r": unknown key training.warmup; did you mean warmup_steps\?"),
    "a key of nowhere": ("training:\n  xyzzy: 3\n", r": unknown key training.xyzzy"),
    "a key of another section": ("training:\n  momentum: 0.9\n", r": unknown key training.momentum"),
    "an unknown section": ("trainign:\n  steps: 3\n", r": unknown section 'trainign'; did you mean training\?"),
    "a number for a section": ("training: 3\n", r": section training must hold keys and values, got 3"),
    "a list of sections": ("- model\n", r": expected sections such as `model:`, got list"),
    "an empty file": ("", r": the file is empty; a config holds sections such as `model:`"),
    "comments only": ("# model:\n", r": the file is empty; a config holds sections such as `model:`"),
    "text for a number": ("training:\n  steps: many\n", r": training.steps='many' must be a whole number"),
    "a fraction": ("training:\n  steps: 1.5\n", r": training.steps=1.5 must be a whole number"),
    "true for a number": ("training:\n  steps: true\n", r": training.steps=True must be a whole number"),
    "true in a list": ("model:\n  moe_layers: [true]\n", r": model.moe_layers\[0\]=True must be a whole number"),
    "a number for true": ("model:\n  mod_enabled: 1\n", r": model.mod_enabled=1 must be true or false"),
    "a number for text": ("data:\n  source: 3\n", r": data.source=3 must be text"),
    "a number for a list": ("model:\n  moe_layers: 1\n", r": model.moe_layers=1 must be a list, such as \[1, 2\]"),
    "not a number": ("training:\n  max_lr: .nan\n", r": training.max_lr=nan must be a number"),
    "an exponent without a point": (
        "training:\n  max_lr: 1e-3\n",
        r": training.max_lr='1e-3' must be a number; it is text, since YAML wants a point in an exponent: write 0.001",
    ),
    "too low": ("training:\n  steps: 0\n", r": training.steps=0 must be more than 0"),
    "too high": ("model:\n  dropout: 1.0\n", r": model.dropout=1.0 must be less than 1"),
    "too low in a list": ("optimizer:\n  betas: [0.9, -1]\n", r": optimizer.betas=\[0.9, -1\] must be at least 0"),
    "no such choice": ("optimizer:\n  type: muno\n", r": optimizer.type='muno' is not .*; did you mean muon\?"),
    "heads that do not divide": (
        "model:\n  n_heads: 6\n  n_kv_heads: 4\n",
        r": model.n_kv_heads=4 must divide model.n_heads=6",
    ),
    "a layer that is not there": (
        "model:\n  n_layers: 2\n  mamba_layers: [0, 2]\n",
        r": model.mamba_layers: layer 2 does not exist; n_layers=2, so 0 to 1",
    ),
    "experts of an odd width": (
        "model:\n  moe_layers: [0]\n  d_ff_expert: 12\n",
        r": model.d_ff_expert=12 must be a multiple of 8 where there are experts: .*",
    ),
    "a layer below 0": ("model:\n  moe_layers: [-1]\n", r": model.moe_layers: layer -1 does not exist; .* 0 to 3"),
    "more experts than there are": ("model:\n  n_experts: 2\n  moe_top_k: 3\n", r": model.moe_top_k=3 is more than .*=2.*"),
    "a weight missing": ("model:\n  n_pred_tokens: 3\n", r": model.aux_loss_weights has 2 values for .*n_pred_tokens=3.*"),
    "an endless stream": ("data:\n  source: hf:a/b\n", r": data.max_bytes is needed with data.source=hf:a/b: .*"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_a_wrong_file(error, tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert re.fullmatch(r"\{dir\}/config.yaml" + expected, error(str(tmp_path / "config.yaml"), "--run-dir", "run"))


def test_no_such_file(error, tmp_path: Path) -> None:
    assert error("nothing.yaml") == "nothing.yaml: no such file"
    (tmp_path / "smoke.yaml").touch()
    assert error(str(tmp_path / "smok.yaml")) == "{dir}/smok.yaml: no such file; did you mean {dir}/smoke.yaml?"


def test_a_folder_and_a_binary_for_a_file(error, tmp_path: Path) -> None:
    assert re.match(r"\{dir\}: cannot be read as UTF-8 text: .*directory", error(str(tmp_path)))
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "c.yaml: cannot be read as UTF-8 text: 'utf-8' codec" in error(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", "override 'training.steps' must read section.key=value, such as training.steps=200"),
        ("steps=3", "override 'steps=3' must read section.key=value, such as training.steps=200"),
        ("training.step=3", "override: unknown key training.step; did you mean steps?"),
        ("train.steps=3", "override: unknown section 'train'; did you mean training?"),
        ("training.steps=1e-3", "override: training.steps=0.001 must be a whole number"),
        ("training.max_lr=", "override: training.max_lr=None must be a number"),
        ("training.max_lr=[", "override 'training.max_lr=[': the value is not valid YAML"),
        ("model.n_kv_heads=3", "override: model.n_kv_heads=3 must divide model.n_heads=4"),
    ],
)
def test_a_wrong_override(error, override: str, expected: str) -> None:
    assert error(str(CONFIGS / "smoke.yaml"), override) == expected


def test_data_that_is_not_there(error, tmp_path: Path) -> None:
    smoke = str(CONFIGS / "smoke.yaml")
    line = error(smoke, "data.source=/no/such/place", "--run-dir", "run")
    assert line == "data.source=/no/such/place: no such file or folder; write stdlib, a path, or hf:NAME"
    (tmp_path / "few.txt").write_text("a few words\n")
    line = error(smoke, f"data.source={tmp_path / 'few.txt'}", "--run-dir", "run")
    assert re.match(r"data.source=\{dir\}/few.txt is too little text: .* give more text", line)


def test_a_device_that_is_not_there(error, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = error(str(CONFIGS / "smoke.yaml"), "training.device=cuda", "--run-dir", "run")
    assert re.fullmatch(r"training.device=cuda is not available here; this machine has .*cpu; or set auto", line)


def test_nothing_to_resume(error) -> None:
    line = error(str(CONFIGS / "smoke.yaml"), "--run-dir", "run", "--resume")
    assert line == "run: nothing to resume from, checkpoints/ holds no whole checkpoint; start in a new directory"


@pytest.mark.parametrize(
    ("argv", "word"),
    [([], "config"), (["a.yaml", "--run-dri", "x"], "--run-dri"), (["a.yaml", "--run-dir"], "--run-dir")],
)
def test_a_wrong_command_line(error, argv: list[str], word: str) -> None:
    assert word in error(*argv)


@pytest.mark.parametrize("argv", [[], ["rnu"]])
def test_a_wrong_command(capsys, argv: list[str]) -> None:
    assert main(argv) == 2
    assert re.fullmatch(r"error: .*command.*; see python -m moe_lab --help\n", capsys.readouterr().err)


def test_the_process_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe_lab", "run", "nothing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nothing.yaml: no such file\n")
    assert list(tmp_path.iterdir()) == []


def command_of(folder: Path, **changes: dict) -> list[str]:
    """`run` of a tiny config in `folder`, in its folder `run`."""
    (folder / "c.yaml").write_text(to_yaml(tiny(folder, **changes)))
    return ["run", str(folder / "c.yaml"), "--run-dir", str(folder / "run")]


def test_a_run_says_where_it_is(tmp_path: Path, capsys) -> None:
    command, run_dir = command_of(tmp_path), tmp_path / "run"
    assert main([*command, "training.steps=2", "training.max_lr=1e-2"]) == 0  # overrides may follow an option
    assert capsys.readouterr().out == (
        f"finished: 2 steps in {run_dir}; see record.jsonl and summary.json\n0 errors, 0 warnings, 0 info\n"
    )
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["findings"] == []  # watched, and nothing found
    assert main(command) == 2
    assert "resume" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "c.yaml"), "training.steps=3", "--run-dir", str(run_dir), "--resume"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("finished: 3 steps") and "training.steps: stored 2, given 3" in err


def test_a_sick_run_is_told_while_it_runs(tmp_path: Path, capsys) -> None:
    training, run_dir = {"steps": 40, "max_lr": 1e-3, "eval_interval": 10}, tmp_path / "run"
    assert main(command_of(tmp_path, precision={"parameters": "bfloat16"}, training=training)) == 1
    out, err = capsys.readouterr()
    before_training = err[: err.index("step 0: validation loss")]
    assert re.search(rf"^error: bf16_parameters: {tmp_path}/c.yaml:\d+: \S", before_training, re.MULTILINE)
    assert "lost_updates: bfloat16 rounds updates away" in err
    written = [json.loads(line) for line in (run_dir / "findings.jsonl").read_text().splitlines()]
    assert "lost_updates" in {finding["rule"] for finding in written}
    assert json.loads((run_dir / "summary.json").read_text())["findings"] == written
    assert out.endswith(f"see {run_dir / 'findings.jsonl'}\n")


def test_a_run_ends_with_1_for_what_preflight_found_alone(tmp_path: Path, capsys) -> None:
    """Two updates are too few for the watch to find anything."""
    assert main(command_of(tmp_path, precision={"parameters": "bfloat16"}, training={"steps": 2})) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["findings"] == []
    assert capsys.readouterr().out.endswith("0 errors, 0 warnings, 0 info\n")


def test_nothing_is_written_into_a_run_that_another_process_holds(tmp_path: Path, capsys, monkeypatch) -> None:
    command = command_of(tmp_path, training={"steps": 2})
    assert main(command) == 0
    monkeypatch.setattr(command_line, "Watch", lambda *given, **options: pytest.fail("a watch opened its log"))
    before = contents(tmp_path / "run")
    with FileLock(tmp_path / "run" / ".lock"):
        assert main([*command, "--resume"]) == 2
    assert "another process trains here; wait for it" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("text", ["[a, b]: 1\n", "model:\n  ? {a: 1}\n  : 2\n", 'model: {"a\\nb": 1}\n'])
def test_a_key_that_is_no_word(error, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert "config.yaml" in error(str(tmp_path / "config.yaml"))


def test_resume_needs_a_directory(tmp_path: Path, capsys) -> None:
    assert main([*command_of(tmp_path)[:2], "--resume"]) == 2
    assert capsys.readouterr().err == "error: --resume needs --run-dir: the directory of the run to go on with\n"


# ---- preflight and inspect -------------------------------------------------------------------------------------------


def look(capsys, *argv: str) -> tuple[int, list[str], str]:
    """Exit code, lines on stdout, stderr."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.mark.parametrize(
    ("name", "code", "counts"),
    [
        *((name, 0, "0 errors, 0 warnings, 0 info") for name in ("smoke", "lab", "gpu", "training_1.5b")),
        ("training_1.5b_as_reported", 1, "1 error, 2 warnings, 0 info"),
    ],
)
def test_preflight_of_our_configs(capsys, name: str, code: int, counts: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    got, lines, err = look(capsys, "preflight", str(path))
    assert (got, lines[-1], err) == (code, counts, "")
    assert len(lines) == 1 + sum(int(number) for number in re.findall(r"\d+", counts))
    assert all(re.match(rf"(error|warning|info): \w+: {re.escape(str(path))}:\d+: \S", line) for line in lines[:-1])


def test_preflight_of_a_bad_file_is_one_line(tmp_path: Path, capsys) -> None:
    (tmp_path / "c.yaml").write_text("model:\n  d: [1, 2\ntraining:\n")
    code, lines, err = look(capsys, "preflight", str(tmp_path / "c.yaml"))
    assert (code, lines) == (2, [])
    assert re.fullmatch(rf"error: {tmp_path}/c.yaml, line 3: not valid YAML: .*; correct it\n", err)


def test_inspect(tmp_path: Path, capsys) -> None:
    torch.save({"model": {"norm.weight": torch.ones(4), "x": torch.tensor([1.0, 2.0])}}, tmp_path / "a.pt")
    torch.save({"model": {"x": torch.tensor([1.0, torch.nan])}}, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_text("none")
    code, lines, err = look(capsys, "inspect", str(tmp_path / "a.pt"))
    assert (code, lines[-1], err) == (0, "0 errors, 1 warning, 1 info", "")
    assert lines[0].startswith("warning: never_moved: norm.weight: 1 of 1 norm weights: exactly 1 in every element")
    code, lines, err = look(capsys, "inspect", str(tmp_path / "b.pt"))
    assert (code, lines[-1], err) == (1, "1 error, 0 warnings, 1 info", "")
    assert look(capsys, "inspect", str(tmp_path / "c.pt"))[0] == 1
    error = f"error: {tmp_path}/none.pt: no such file; give the path of a checkpoint\n"
    assert look(capsys, "inspect", str(tmp_path / "none.pt")) == (2, [], error)


@pytest.mark.parametrize("command", ["preflight", "inspect"])
def test_the_help_names_the_exit_codes(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "Exit code 0: no error among them; 1: an error; 2: the file cannot be used." in text


@pytest.mark.parametrize(
    "argv", [["preflight"], ["inspect"], ["preflight", "a.yaml", "b.yaml"], ["inspect", "--x", "a"]]
)
def test_a_wrong_look(capsys, argv: list[str]) -> None:
    code, lines, err = look(capsys, *argv)
    assert (code, lines, err.count("\n")) == (2, [], 1) and "--help" in err


# ---- killed and resumed ----------------------------------------------------------------------------------------------

# The command line, killed after the given update.
KILLED = """
import os, signal, sys
import torch
from moe_lab import Trainer
from moe_lab.__main__ import main

torch.set_num_threads(1)
update = Trainer.update

def update_and_die(trainer):
    report = update(trainer)
    if report.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return report

Trainer.update = update_and_die
main(sys.argv[2:])
"""


def test_a_run_that_was_killed_has_the_findings_of_one_that_was_not(tmp_path: Path, capsys) -> None:
    """Steps count from the run's first update; nothing is told twice; what came after the checkpoint, at 48, is cut."""
    training = {"steps": 60, "max_lr": 1e-3, "eval_interval": 60, "save_interval": 24}
    command = command_of(tmp_path, precision={"parameters": "bfloat16"}, training=training)[:-1]
    assert main([*command, str(tmp_path / "whole")]) == 1
    whole = (tmp_path / "whole" / "findings.jsonl").read_text()
    found_at = {json.loads(line)["step"] for line in whole.splitlines()}
    assert 20 in found_at and max(found_at) < 48, "what is under way at the checkpoint would be found later"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "55", *command, str(tmp_path / "killed")], capture_output=True, cwd=ROOT
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    log = tmp_path / "killed" / "findings.jsonl"
    assert log.read_text() == whole
    beyond = json.loads(whole.splitlines()[-1]) | {"step": 50, "message": "found between the checkpoint and the kill"}
    log.write_text(whole + json.dumps(beyond) + "\n" + '{"rule": "cut sh')
    assert main([*command, str(tmp_path / "killed"), "--resume"]) == 1
    assert log.read_text() == whole
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0]["findings"] == summaries[1]["findings"] == [json.loads(line) for line in whole.splitlines()]


def test_an_installed_package_writes_where_it_is_started_and_knows_no_commit(tmp_path: Path) -> None:
    """Copied into the site-packages of an environment that lies in somebody else's repository, and started elsewhere."""
    site = tmp_path / "project" / "site-packages"
    shutil.copytree(ROOT / "moe_lab", site / "moe_lab", ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.email=a@b", "-c", "user.name=a"]
    for git in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "not ours"]):
        subprocess.run(["git", *git], cwd=tmp_path / "project", check=True)
    (tmp_path / "elsewhere").mkdir()
    code = "from moe_lab.data.prepare import CACHE; from moe_lab.train.record import commit; print(CACHE, commit())"
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{tmp_path / 'elsewhere' / '.cache'} None\n", done.stderr
