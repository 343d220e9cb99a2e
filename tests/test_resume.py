"""A run that was killed, or run again, is the same run: every field of the record but the times, bit for bit."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import refused
from tiny_run import contents, evaluations_of, steps_of, tiny, train, without_times
from torch.optim import AdamW

from moe_lab import RunError, Trainer, build_model, load_config
from moe_lab.config import Config, to_yaml
from moe_lab.data import Batches
from moe_lab.train import read_record
from moe_lab.train.checkpoint import load_checkpoint, save_atomically, step_path
from moe_lab.train.record import read_jsonl

N_STEPS = 24
# Trains `config` in `run_dir`, resuming if it can, in one process after another, each killed: "7" dies after update 7,
# "save 8" halfway through the save at 8.
CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from moe_lab import Trainer, load_config

torch.set_num_threads(1)
config, run_dir = load_config(sys.argv[1]), Path(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def train_until(kill):
    trainer = Trainer(config, run_dir, resume=any(run_dir.glob("checkpoints/*.pt")))
    save, update, step = torch.save, trainer.update, int(kill.split()[-1])

    def half(state, file):
        save(state, file)
        if state["step"] == step:
            file.truncate(file.tell() // 2)
            file.flush()
            die()

    if kill.startswith("save"):
        torch.save = half
    else:
        trainer.update = lambda: (update(), trainer.step == step and die())
    trainer.fit()

for kill in sys.argv[3:]:
    if not os.fork():
        train_until(kill)
        os._exit(1)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
    print(*(path.name for path in run_dir.glob("checkpoints/*.part")), flush=True)  # or the next child holds it, too
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    """Uninterrupted, in this process."""
    folder = tmp_path_factory.mktemp("resume")
    training = {"steps": N_STEPS, "batch_size": 4, "log_interval": 3, "eval_interval": 7}
    config = tiny(folder, n_words=800, training=training | {"save_interval": 4})
    assert config.model.dropout == 0.1 and config.model.mod_enabled and config.model.moe_layers
    assert config.model.mamba_enabled and config.model.mamba_layers
    (folder / "config.yaml").write_text(to_yaml(config))
    return train(load_config(folder / "config.yaml"), folder / "whole")


def test_three_kills_one_of_them_in_a_save(whole: Trainer) -> None:
    """In processes of their own: what a process makes of a seed is compared, too."""
    choose = random.Random(2)
    first, second = choose.randint(5, 8), 4 * choose.randint(3, 4)
    third = choose.randint(second + 2, N_STEPS - 2)
    run_dir = whole.run_dir.parent / "killed"
    command = [sys.executable, "-c", CHILD, str(run_dir.parent / "config.yaml"), str(run_dir)]
    command += [str(first), f"save {second}", str(third)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert re.findall(r"resuming after step (\d+) of", done.stderr) == [str(first // 4 * 4), str(second - 4)]
    assert re.fullmatch(rf"\nstep_{second:06d}.pt.\d+.part\n\n", done.stdout)  # half of a checkpoint, then swept up
    train(whole.config, run_dir, resume=True)
    rows = without_times(read_record(run_dir))
    assert rows == without_times(read_record(whole.run_dir))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, N_STEPS + 1))
    assert [row["step"] for row in rows if row.get("event") == "eval"] == [0, 7, 14, 21, 24]
    one, other = (load_checkpoint(step_path(folder, N_STEPS)) for folder in (whole.run_dir, run_dir))
    assert one["data_state"] == other["data_state"] and one["data_state"]["epoch"] > 0
    for name, p in one["model_state_dict"].items():
        assert other["model_state_dict"][name].equal(p), name
    assert all(state.equal(other["rng_state"][name]) for name, state in one["rng_state"].items())
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"


# ---- what a resumed run takes from where ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Trainer:
    """A run of 4 of 8 steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = tiny(folder, training={"steps": 8, "log_interval": 1, "save_interval": 2, "warmup_steps": 0})
    trainer = Trainer(config, folder / "run")
    trainer.listeners.append(lambda row: row["step"] == 4 and trainer.stop())
    assert trainer.fit()["status"] == "interrupted"
    return trainer


@pytest.fixture
def half_way(interrupted: Trainer, tmp_path: Path) -> tuple[Config, Path]:
    """The config, and a copy of the directory to go on in."""
    return interrupted.config, shutil.copytree(interrupted.run_dir, tmp_path / "run")


def test_the_given_config_wins_for_lr_and_budget(half_way, capsys) -> None:
    """C17 says that the old LR is baked into a checkpoint, B13 is the bug that would make it so."""
    config, run_dir = half_way
    old = steps_of(run_dir)
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
    rows = steps_of(run_dir)
    assert rows[:4] == old and [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in rows[4:]] == [{"muon": 0.005, "adamw_decayed": 0.0025, "adamw": 0.0025}] * 2
    # what the optimizers really did: an RMSNorm moves by at most Adam's LR, times the growth of its bias correction
    before = load_checkpoint(run_dir / "checkpoints" / "checkpoint_interrupted.pt")["model_state_dict"]
    moved = (resumed.model.final_norm.weight - before["final_norm.weight"]).abs().max().item()
    assert 0.0025 < moved < 2 * 0.0025 * 1.5  # the stored LR of 0.0016 · 0.1 could not
    assert load_checkpoint(step_path(run_dir, 6))["config"]["training"]["max_lr"] == 0.005


def test_what_the_state_depends_on_is_kept(half_way, capsys) -> None:
    config, run_dir = half_way
    changed = config.with_(
        training={"seed": 5, "batch_size": 4}, model={"dropout": 0.0}, optimizer={"momentum": 0.5, "type": "adamw"}
    )
    resumed = Trainer(changed, run_dir, resume=True)
    assert capsys.readouterr().err.splitlines()[1:] == [
        "model.dropout: stored 0.1, given 0.0: the stored value is kept",
        "training.batch_size: stored 2, given 4: the stored value is kept",
        "training.seed: stored 0, given 5: the stored value is kept",
        "optimizer.type: stored muon, given adamw: the stored value is kept",
        "optimizer.momentum: stored 0.95, given 0.5: the stored value is kept",
    ]
    assert resumed.config.training.seed == 0 and resumed.config.training.batch_size == 2
    assert [group["momentum"] for group in resumed.optimizers[0].param_groups] == [0.95]
    assert resumed.config == Trainer(config, run_dir, resume=True).config


def test_a_checkpoint_of_an_optimizer_that_was_not_fused_is_resumed_fused(half_way, monkeypatch) -> None:
    """torch takes the counts to the device where the state that it loads says fused; on CUDA a fused step needs them there."""
    config, run_dir = half_way
    path = run_dir / "checkpoints" / "checkpoint_interrupted.pt"
    state = load_checkpoint(path)
    for group in state["optimizer_state_dict"][1]["param_groups"]:
        group["fused"] = None
    torch.save(state, path)
    handed, load = [], AdamW.load_state_dict

    def noted(optimizer: AdamW, state: dict) -> None:
        handed.extend(group["fused"] for group in state["param_groups"])
        load(optimizer, state)

    monkeypatch.setattr(AdamW, "load_state_dict", noted)
    resumed = train(config, run_dir, resume=True)
    assert handed == [True, True] and "fused" not in resumed.optimizers[0].param_groups[0]


def test_another_architecture_is_an_error(half_way) -> None:
    config, run_dir = half_way
    before = contents(run_dir)
    for key, value in {"d_ff": 48, "n_layers": 4, "mod_enabled": False, "moe_layers": (0,)}.items():
        with refused(RunError, match=rf"model.{key} is .* there and .* in the config given; another arch"):
            Trainer(config.with_(model={key: value}), run_dir, resume=True)
    assert contents(run_dir) == before


def test_another_text_is_an_error(half_way) -> None:
    config, run_dir = half_way
    source = Path(config.data.source)
    text = source.read_text()
    source.write_text(text.replace("a", "b", 3))  # as many tokens as before, or nearly
    try:
        with refused(RunError, match="the text of data.source=.* has changed since the checkpoint"):
            Trainer(config, run_dir, resume=True)
    finally:
        source.write_text(text)


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
    assert [row["step"] for row in steps_of(run_dir)] == list(range(1, 9))
    evaluations = evaluations_of(run_dir)
    assert [row["step"] for row in evaluations] == [0, 4, 8] and evaluations[1]["validation_loss"] > 1
    assert read_jsonl(run_dir / "controls.jsonl") == []
    seconds = [row["seconds"] for row in read_record(run_dir)]
    assert seconds == sorted(seconds)  # the clock goes on where the checkpoint left it


def test_a_finished_run_resumes_to_nothing(run: Trainer, tmp_path: Path) -> None:
    shutil.copytree(run.run_dir, tmp_path / "run")
    summary = Trainer(run.config, tmp_path / "run", resume=True).fit()
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    assert read_record(tmp_path / "run") == read_record(run.run_dir)
    fewer = Trainer(run.config.with_(training={"steps": 2}), tmp_path / "run", resume=True)
    with refused(RunError, match=r"6 steps are done and training.steps=2; ask for more"):
        fewer.fit()


def test_a_stop_in_the_last_evaluation_leaves_it_to_the_next_run(run: Trainer, tmp_path: Path) -> None:
    trainer = Trainer(run.config, tmp_path / "run")
    trainer.listeners.append(lambda row: row["step"] == 6 and trainer.stop())
    assert trainer.fit()["status"] == "interrupted" and trainer.step == 6
    assert [row["step"] for row in evaluations_of(tmp_path / "run")] == [0, 4]
    assert train(run.config, tmp_path / "run", resume=True).step == 6
    assert without_times(read_record(tmp_path / "run")) == without_times(read_record(run.run_dir))


def test_a_vocabulary_that_the_text_did_not_fill_is_no_other_architecture(tmp_path: Path, capsys) -> None:
    config = tiny(tmp_path, training={"steps": 1}, model={"vocab_size": 5000}, precision={"compute": "auto"})
    trainer = train(config, tmp_path / "run")
    n_words = trainer.dataset.tokenizer.get_vocab_size()
    assert n_words < 5000 and trainer.model.embedding.weight.shape[0] == n_words
    assert load_config(tmp_path / "run" / "config.yaml").model.vocab_size == n_words
    resumed = Trainer(config.with_(training={"steps": 3}), tmp_path / "run", resume=True)
    assert (resumed.step, resumed.config.model.vocab_size) == (1, n_words)
    assert capsys.readouterr().err.splitlines()[1:] == ["training.steps: stored 1, given 3: the given value is used"]


def test_dropout_follows_from_the_seed_alone(run: Trainer, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 1):  # of dropout alone: the model and the data are those of seed 0
        torch.rand(seed + 1)  # whatever else a notebook has drawn before
        trainer = Trainer(run.config.with_(training={"seed": seed}), tmp_path / f"{seed}")
        trainer.model.load_state_dict(build_model(trainer.config.model, 0).state_dict())
        trainer.batches = Batches(trainer.dataset.train, 16, 2, 0)
        list(trainer.steps(until=1))
        losses.append(steps_of(trainer.run_dir)[0]["loss"])
    assert losses[0] != losses[1] and losses[0] == steps_of(run.run_dir)[0]["loss"]


@pytest.mark.parametrize("old", [False, True])  # a checkpoint from before dropout had a generator of its own
def test_cells_that_draw_numbers_do_not_disturb_a_live_run(run: Trainer, tmp_path: Path, old: bool) -> None:
    """A cell of a notebook that draws while a thread trains: here from within the run, at every row."""
    assert run.config.model.dropout == 0.1
    config = run.config.with_(training={"log_interval": 1})
    trainer = Trainer(config, tmp_path / "run", listeners=[lambda row: torch.rand(7)])
    for _ in trainer.steps(until=4):
        torch.rand(3)
    trainer.save(step_path(trainer.run_dir, 4))
    if old:
        state = load_checkpoint(step_path(trainer.run_dir, 4))
        state["rng_state"]["cpu"] = state["rng_state"].pop("dropout")
        save_atomically(state, step_path(trainer.run_dir, 4))
    torch.rand(5)
    resumed = Trainer(config, tmp_path / "run", resume=True, listeners=[lambda row: torch.rand(7)])
    torch.rand(5)
    assert len(list(resumed.steps())) == 2
    assert without_times(steps_of(tmp_path / "run")) == without_times(steps_of(run.run_dir))
