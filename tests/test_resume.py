"""A run that was killed, or run again, is the same run: every field of the record but the times, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import refused
from tiny_run import contents, tiny, train, without_times

from moe_lab import RunError, Trainer, load_config
from moe_lab.config import to_yaml
from moe_lab.train import read_record
from moe_lab.train.checkpoint import load_checkpoint, step_path
from moe_lab.train.record import read_jsonl

N_STEPS = 44
# Trains `config` in `run_dir`, resuming if it can. kill="7" dies after update 7, "save 8" halfway through the save at 8.
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from moe_lab import Trainer, load_config

torch.set_num_threads(1)
config, run_dir, kill = load_config(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
trainer = Trainer(config, run_dir, resume=any(run_dir.glob("checkpoints/*.pt")))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if kill.startswith("save"):
    save = torch.save
    def half(state, file):
        if state["step"] == int(kill.split()[1]):
            save(state, file)
            file.truncate(file.tell() // 2)
            file.flush()
            die()
        save(state, file)
    torch.save = half
elif kill:
    update = trainer.update
    trainer.update = lambda: (update(), trainer.step == int(kill) and die())
trainer.fit()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    training = {"steps": N_STEPS, "gradient_accumulation_steps": 4, "log_interval": 3, "eval_interval": 11}
    config = tiny(folder, training=training | {"save_interval": 4})
    assert config.model.dropout == 0.1 and config.model.mod_enabled and config.model.moe_layers
    assert config.model.mamba_enabled and config.model.mamba_layers
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def child(folder: Path, name: str, kill: str = "") -> str:
    """Run CHILD in a process of its own. Returns what it wrote to stderr."""
    command = [sys.executable, "-c", CHILD, str(folder / "config.yaml"), str(folder / name), kill]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    train(load_config(folder / "config.yaml"), folder / "whole")  # in this process
    return folder / "whole"


def assert_identical(one: Path, other: Path) -> None:
    rows = without_times(read_record(one))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, N_STEPS + 1))
    assert [row["step"] for row in rows if row.get("event") == "eval"] == [0, 11, 22, 33, 44]
    assert without_times(read_record(other)) == rows
    ends = [load_checkpoint(step_path(run_dir, N_STEPS)) for run_dir in (one, other)]
    assert ends[0]["data_state"] == ends[1]["data_state"] and ends[0]["data_state"]["epoch"] > 0
    for name, p in ends[0]["model_state_dict"].items():
        assert ends[1]["model_state_dict"][name].equal(p), name
    assert ends[0]["rng_state"]["cpu"].equal(ends[1]["rng_state"]["cpu"])


def test_three_kills_one_of_them_in_a_save(folder: Path, whole: Path) -> None:
    """Each in a process of its own: what a process makes of a seed is compared, too."""
    choose = random.Random(2)
    first, second = choose.randint(5, 12), 4 * choose.randint(5, 6)
    third = choose.randint(second + 2, N_STEPS - 2)
    run_dir = folder / "killed"
    child(folder, "killed", str(first))
    resumed_at = f"resuming after step {first // 4 * 4} of"
    assert resumed_at in child(folder, "killed", f"save {second}")
    (half,) = (run_dir / "checkpoints").glob("*.part")
    assert not step_path(run_dir, second).exists() and half.stat().st_size > 1000
    assert f"resuming after step {second - 4} of" in child(folder, "killed", str(third))
    train(load_config(folder / "config.yaml"), run_dir, resume=True)
    assert_identical(whole, run_dir)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"


# ---- what a resumed run takes from where ----------------------------------------------------------------------------


@pytest.fixture
def half_way(tmp_path: Path):
    """A run of 4 of 8 steps, interrupted, and its config."""
    config = tiny(tmp_path, training={"steps": 8, "log_interval": 1, "save_interval": 2, "warmup_steps": 0})
    trainer = Trainer(config, tmp_path / "run")
    trainer.listeners.append(lambda row: row["step"] == 4 and trainer.stop())
    assert trainer.fit()["status"] == "interrupted"
    return config, tmp_path / "run"


def test_the_given_config_wins_for_lr_and_budget(half_way, capsys) -> None:
    """C17 says that the old LR is baked into a checkpoint, B13 is the bug that would make it so."""
    config, run_dir = half_way
    old = [row for row in read_record(run_dir) if "loss" in row]
    capsys.readouterr()
    changes = {"max_lr": 0.005, "steps": 6, "min_lr_ratio": 1.0}
    changed = config.with_(training=changes, optimizer={"adamw_lr_ratio": 0.5, "embedding_lr_ratio": None})
    resumed = train(changed, run_dir, resume=True)
    assert capsys.readouterr().err.splitlines() == [
        f"resuming after step 4 of {run_dir}/checkpoints/checkpoint_interrupted.pt",
        "training.steps: stored 8, given 6: the given value is used",
        "training.max_lr: stored 0.02, given 0.005: the given value is used",
        "training.min_lr_ratio: stored 0.1, given 1.0: the given value is used",
        "optimizer.adamw_lr_ratio: stored 0.08, given 0.5: the given value is used",
        "optimizer.embedding_lr_ratio: stored 0.3, given None: the given value is used",
    ]
    rows = [row for row in read_record(run_dir) if "loss" in row]
    assert rows[:4] == old and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in rows[4:]] == [{"muon": 0.005, "adamw_decayed": 0.0025, "adamw": 0.0025}] * 2
    # what the optimizers really did: an RMSNorm moves by at most Adam's LR, times the growth of its bias correction
    before = load_checkpoint(run_dir / "checkpoints" / "checkpoint_interrupted.pt")["model_state_dict"]
    moved = (resumed.model.final_norm.weight - before["final_norm.weight"]).abs().max().item()
    assert 0.0025 < moved < 2 * 0.0025 * 1.5  # the stored LR of 0.0016 · 0.1 could not
    assert load_checkpoint(step_path(run_dir, 6))["config"]["training"]["max_lr"] == 0.005


def test_what_the_state_depends_on_is_kept(half_way, capsys) -> None:
    config, run_dir = half_way
    capsys.readouterr()
    changed = config.with_(
        training={"seed": 5, "batch_size": 4}, model={"dropout": 0.0}, optimizer={"momentum": 0.5, "type": "adamw"}
    )
    resumed = train(changed, run_dir, resume=True)
    lines = capsys.readouterr().err.splitlines()[1:]
    assert lines == [
        "model.dropout: stored 0.1, given 0.0: the stored value is kept",
        "training.batch_size: stored 2, given 4: the stored value is kept",
        "training.seed: stored 0, given 5: the stored value is kept",
        "optimizer.type: stored muon, given adamw: the stored value is kept",
        "optimizer.momentum: stored 0.95, given 0.5: the stored value is kept",
    ]
    assert resumed.config.training.seed == 0 and resumed.config.training.batch_size == 2
    assert [group["momentum"] for group in resumed.optimizers[0].param_groups] == [0.95]
    assert resumed.config == Trainer(config, run_dir, resume=True).config


def test_another_architecture_is_an_error(half_way) -> None:
    config, run_dir = half_way
    before = contents(run_dir)
    for key, value in {"d_ff": 48, "n_layers": 4, "mod_enabled": False, "moe_layers": (0,)}.items():
        with refused(RunError, match=rf"model.{key} is .* there and .* in the config given; another arch"):
            Trainer(config.with_(model={key: value}), run_dir, resume=True)
    assert contents(run_dir) == before


def test_another_text_is_an_error(half_way, tmp_path: Path) -> None:
    config, run_dir = half_way
    text = tmp_path / "text.txt"
    text.write_text(text.read_text().replace("a", "b", 3))  # as many tokens as before, or nearly
    with refused(RunError, match="the text of data.source=.* has changed since the checkpoint"):
        train(config, run_dir, resume=True)


def test_rows_beyond_the_checkpoint_are_cut(half_way) -> None:
    config, run_dir = half_way
    (run_dir / "checkpoints" / "checkpoint_interrupted.pt").unlink()
    step_path(run_dir, 4).unlink()
    with (run_dir / "record.jsonl").open("a") as file:
        file.write('{"event": "eval", "step": 4, "tokens": 1, "validation_loss": 0.0, "seconds": 1.0}\n{"step": 5, "lo')
    with (run_dir / "controls.jsonl").open("a") as file:
        file.write('{"step": 3, "action": "save"}\n')
    findings = [{"rule": "reach", "step": step} for step in (None, 0, 2, 3, 4)]
    (run_dir / "findings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in findings) + '{"rule": "cut')
    assert train(config, run_dir, resume=True).step == 8
    assert read_jsonl(run_dir / "findings.jsonl") == findings[:3]
    rows = read_record(run_dir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    evaluations = [row for row in rows if row.get("event") == "eval"]
    assert [row["step"] for row in evaluations] == [0, 4, 8] and evaluations[1]["validation_loss"] > 1
    assert all(row["step"] <= 2 for row in map(json.loads, (run_dir / "controls.jsonl").read_text().splitlines()))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)  # the clock goes on where the checkpoint left it


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"steps": 3})
    train(config, tmp_path / "run")
    before = read_record(tmp_path / "run")
    summary = Trainer(config, tmp_path / "run", resume=True).fit()
    assert (summary["status"], summary["steps"]) == ("finished", 3)
    assert read_record(tmp_path / "run") == before


def test_a_stop_in_the_last_evaluation_leaves_it_to_the_next_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"steps": 3, "log_interval": 1})
    trainer = Trainer(config, tmp_path / "run")
    trainer.listeners.append(lambda row: row["step"] == 3 and trainer.stop())
    assert trainer.fit()["status"] == "interrupted" and trainer.step == 3
    assert [row["step"] for row in read_record(tmp_path / "run") if row.get("event") == "eval"] == [0]
    assert train(config, tmp_path / "run", resume=True).step == 3
    train(config, tmp_path / "whole")
    assert without_times(read_record(tmp_path / "run")) == without_times(read_record(tmp_path / "whole"))


def test_a_vocabulary_that_the_text_did_not_fill_is_no_other_architecture(tmp_path: Path, capsys) -> None:
    config = tiny(tmp_path, training={"steps": 2}, model={"vocab_size": 5000}, precision={"compute": "auto"})
    train(config, tmp_path / "run")
    capsys.readouterr()
    resumed = train(config.with_(training={"steps": 3}), tmp_path / "run", resume=True)
    assert resumed.step == 3 and resumed.model.embedding.weight.shape[0] < 5000
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["training.steps: stored 2, given 3: the given value is used"]


def test_a_run_moves_with_its_directory(half_way, tmp_path: Path) -> None:
    config, run_dir = half_way
    shutil.move(run_dir, tmp_path / "elsewhere")
    assert train(config, tmp_path / "elsewhere", resume=True).step == 8
    assert not run_dir.exists() and re.search("elsewhere", str(step_path(tmp_path / "elsewhere", 8)))


def test_fewer_steps_than_done(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"steps": 4})
    Trainer(config, tmp_path / "run").fit()
    fewer = Trainer(config.with_(training={"steps": 2}), tmp_path / "run", resume=True)
    with refused(RunError, match=r"4 steps are done and training.steps=2; ask for more"):
        fewer.fit()
