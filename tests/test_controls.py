import json
import threading
import time
from pathlib import Path

import pytest
from tiny_run import parameters, tiny, train, without_times

from moe_lab import Trainer
from moe_lab.train import checkpoint, read_record
from moe_lab.train.checkpoint import load_checkpoint, step_path
from moe_lab.train.controls import Controls
from moe_lab.train.record import read_jsonl


def steered(folder: Path, name: str, at: dict[int, list[tuple]], **training) -> Trainer:
    """A run in which `at[step]` is asked for once that row is told; log_interval 1 tells it right after its update."""
    config = tiny(folder, training={"log_interval": 1, "save_interval": 100, **training})
    trainer = Trainer(config, folder / name)
    trainer.listeners.append(
        lambda row: (
            [getattr(trainer.controls, action)(*values) for action, *values in at.get(row["step"], ())]
            if "loss" in row
            else None
        )
    )
    trainer.fit()
    return trainer


def test_actions_are_written_with_their_update(tmp_path: Path) -> None:
    asked = {2: [("set_lr_scale", 0.5), ("save",)], 3: [("pause",), ("resume",)], 4: [("set_lr_scale", 2), ("stop",)]}
    trainer = steered(tmp_path, "run", asked)
    assert read_jsonl(tmp_path / "run" / "controls.jsonl") == [
        {"step": 2, "action": "lr_scale", "value": 0.5},
        {"step": 2, "action": "save"},
        {"step": 3, "action": "pause"},
        {"step": 3, "action": "resume"},
        {"step": 4, "action": "lr_scale", "value": 2.0},
        {"step": 4, "action": "stop"},
    ]
    assert trainer.step == 4
    state = load_checkpoint(step_path(tmp_path / "run", 2))
    assert state["step"] == 2 and state["scheduler_state_dict"]["lr_scale"] == 0.5
    rows = [row for row in read_record(tmp_path / "run") if "loss" in row]
    share = [row["lr"]["muon"] / 0.02 for row in rows]
    cosine = 0.1 + 0.9 * (1 + 0.5) / 2  # one of three updates after the warm-up: cos(60°) = 0.5
    assert share == pytest.approx([1 / 3, 2 / 3, 0.5, 0.5 * cosine])  # from the update after the asking on
    assert rows[3]["lr"]["adamw"] / rows[3]["lr"]["muon"] == pytest.approx(0.08)


def test_what_is_asked_during_a_save_is_written_too(tmp_path: Path, monkeypatch) -> None:
    """The loop has taken what was asked by then; a stop must not end it before the next taking."""
    trainer = Trainer(tiny(tmp_path, training={"log_interval": 1, "save_interval": 100}), tmp_path / "run")
    trainer.listeners.append(lambda row: row["step"] == 2 and trainer.controls.save())
    save = checkpoint.save_atomically

    def saved_and_stopped(state: dict, path: Path) -> None:
        save(state, path)
        trainer.stop()

    monkeypatch.setattr(checkpoint, "save_atomically", saved_and_stopped)
    trainer.fit()
    actions = [row["action"] for row in read_jsonl(tmp_path / "run" / "controls.jsonl")]
    assert trainer.step == 2 and actions == ["save", "stop"]


def test_a_replay_gives_the_same_curve(tmp_path: Path) -> None:
    first = steered(tmp_path, "first", {2: [("set_lr_scale", 0.25)], 3: [("save",)], 5: [("stop",)]})
    steered(tmp_path, "plain", {})
    again = Trainer(first.config, tmp_path / "again")
    again.controls.replay(tmp_path / "first" / "controls.jsonl")
    again.fit()
    assert again.step == first.step == 5
    records = [without_times(read_record(tmp_path / name)) for name in ("first", "again", "plain")]
    assert records[0] == records[1] and records[0][4] != records[2][4]
    assert all(p.equal(parameters(again)[name]) for name, p in parameters(first).items())
    controls = [read_jsonl(tmp_path / name / "controls.jsonl") for name in ("first", "again")]
    assert controls[0] == controls[1] and step_path(tmp_path / "again", 3).exists()


def test_a_pause_is_not_replayed(tmp_path: Path) -> None:
    (tmp_path / "controls.jsonl").write_text(json.dumps({"step": 1, "action": "pause"}) + "\n")
    trainer = Trainer(tiny(tmp_path, training={"steps": 2}), tmp_path / "run")
    trainer.controls.replay(tmp_path / "controls.jsonl")
    assert trainer.fit()["status"] == "finished" and not (tmp_path / "run" / "controls.jsonl").exists()


@pytest.mark.parametrize("end", ["resume", "stop"])
def test_a_pause_freezes_the_run_until_it_ends(tmp_path: Path, end: str) -> None:
    config = tiny(tmp_path, training={"log_interval": 1})
    paused = threading.Event()
    trainer = Trainer(config, tmp_path / "run")

    def pause(row: dict) -> None:
        if row["step"] == 2:
            trainer.controls.pause()
            paused.set()

    trainer.listeners.append(pause)
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    assert paused.wait(60)
    for _ in range(200):  # until the loop has noticed
        if (tmp_path / "run" / "controls.jsonl").exists():
            break
        time.sleep(0.05)
    frozen = parameters(trainer)
    trainer.controls.save()  # a paused run still obeys
    for _ in range(200):
        if step_path(tmp_path / "run", 2).exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    assert trainer.step == 2 and thread.is_alive()
    stored = load_checkpoint(step_path(tmp_path / "run", 2))["model_state_dict"]
    assert all(p.equal(frozen[name]) and p.equal(stored[name]) for name, p in parameters(trainer).items())
    getattr(trainer.controls, end)()
    thread.join(60)
    assert not thread.is_alive() and trainer.step == (6 if end == "resume" else 2)
    train(config, tmp_path / "never_paused")
    rows, unpaused = (without_times(read_record(tmp_path / name)) for name in ("run", "never_paused"))
    assert rows == unpaused[: len(rows)]


def test_the_scale_survives_a_resume(tmp_path: Path) -> None:
    first = steered(tmp_path, "run", {2: [("set_lr_scale", 0.25)], 4: [("stop",)]})
    whole = steered(tmp_path, "whole", {2: [("set_lr_scale", 0.25)]})
    resumed = train(first.config, tmp_path / "run", resume=True)
    assert resumed.controls.lr_scale == 0.25 and resumed.step == 6
    assert without_times(read_record(tmp_path / "run")) == without_times(read_record(tmp_path / "whole"))
    assert all(p.equal(parameters(resumed)[name]) for name, p in parameters(whole).items())


def test_a_scale_asked_for_right_after_a_save_survives_a_kill(tmp_path: Path) -> None:
    """The loop saves at step 3 and then obeys; a kill later on must not leave a controls.jsonl that did not happen."""
    first = steered(tmp_path, "run", {3: [("set_lr_scale", 0.25)]}, save_interval=3)
    step_path(tmp_path / "run", 6).unlink()  # as if killed before it
    resumed = train(first.config, tmp_path / "run", resume=True)
    written = read_jsonl(tmp_path / "run" / "controls.jsonl")
    assert resumed.controls.lr_scale == (written[-1]["value"] if written else 1.0)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_a_scale_that_is_none(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^lr_scale=.* must be more than 0$"):
        Controls().set_lr_scale(scale)
