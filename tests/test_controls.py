import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import parameters, steps_of, summary_of, tiny, train, without_times

from moe_lab import Trainer
from moe_lab.config import Config, to_yaml
from moe_lab.train import checkpoint, loop, read_record
from moe_lab.train.checkpoint import load_checkpoint, step_path
from moe_lab.train.controls import Controls
from moe_lab.train.record import read_jsonl


def steered(config: Config, run_dir: Path, asked: dict[int, list[tuple]]) -> Trainer:
    """A run in which `asked[step]` is asked for once that row is told: right after its update."""
    trainer = Trainer(config.with_(training={"log_interval": 1, "save_interval": 100}), run_dir)

    def ask(row: dict) -> None:
        for action, *values in asked.get(row["step"], ()) if "loss" in row else ():
            getattr(trainer.controls, action)(*values)

    trainer.listeners.append(ask)
    trainer.fit()
    return trainer


def controls_of(run_dir: Path) -> list[dict]:
    return read_jsonl(run_dir / "controls.jsonl")


def test_actions_are_written_with_their_update(run: Trainer, tmp_path: Path) -> None:
    asked = {2: [("set_lr_scale", 0.5), ("save",)], 3: [("pause",), ("resume",)], 4: [("set_lr_scale", 2), ("stop",)]}
    trainer = steered(run.config, tmp_path / "run", asked)
    assert controls_of(tmp_path / "run") == [
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
    rows = steps_of(tmp_path / "run")
    share = [row["lr"]["muon"] / 0.02 for row in rows]
    cosine = 0.1 + 0.9 * (1 + 0.5) / 2  # one of three updates after the warm-up: cos(60°) = 0.5
    assert share == pytest.approx([1 / 3, 2 / 3, 0.5, 0.5 * cosine])  # from the update after the asking on
    assert rows[3]["lr"]["adamw"] / rows[3]["lr"]["muon"] == pytest.approx(0.08)


def test_what_is_asked_during_a_save_is_written_too(run: Trainer, tmp_path: Path, monkeypatch) -> None:
    """The loop has taken what was asked by then; a stop must not end it before the next taking."""
    trainer = Trainer(run.config, tmp_path / "run")
    trainer.listeners.append(lambda row: row["step"] == 2 and trainer.controls.save())
    save = checkpoint.save_atomically
    monkeypatch.setattr(checkpoint, "save_atomically", lambda state, path: (save(state, path), trainer.stop()))
    trainer.fit()
    assert trainer.step == 2 and [row["action"] for row in controls_of(tmp_path / "run")] == ["save", "stop"]


def test_a_replay_gives_the_same_curve(run: Trainer, tmp_path: Path) -> None:
    asked = {1: [("pause",), ("resume",)], 2: [("set_lr_scale", 0.25)], 3: [("save",)], 5: [("stop",)]}
    first = steered(run.config, tmp_path / "first", asked)
    again = Trainer(first.config, tmp_path / "again")
    again.controls.replay(tmp_path / "first" / "controls.jsonl")
    again.fit()
    assert again.step == first.step == 5
    rows, repeated, plain = (without_times(steps_of(t.run_dir)) for t in (first, again, run))
    assert rows == repeated and rows[2] != plain[2]
    assert all(p.equal(parameters(again)[name]) for name, p in parameters(first).items())
    assert controls_of(tmp_path / "again") == controls_of(tmp_path / "first")[2:]  # a pause is not repeated
    assert step_path(tmp_path / "again", 3).exists()


def until(happened: Callable[[], bool]) -> None:
    for _ in range(2000):
        if happened():
            return
        time.sleep(0.005)
    pytest.fail("it did not happen")


@pytest.mark.parametrize("end", ["resume", "stop"])
def test_a_pause_freezes_the_run_until_it_ends(run: Trainer, tmp_path: Path, end: str) -> None:
    trainer = Trainer(run.config, tmp_path / "run")
    trainer.listeners.append(lambda row: row["step"] == 2 and trainer.controls.pause())
    thread = threading.Thread(target=trainer.fit, daemon=True)
    thread.start()
    until((tmp_path / "run" / "controls.jsonl").exists)  # the loop has noticed
    frozen = parameters(trainer)
    trainer.controls.save()  # a paused run still obeys
    until(step_path(tmp_path / "run", 2).exists)
    time.sleep(0.15)  # longer than the loop waits
    assert trainer.step == 2 and thread.is_alive()
    stored = load_checkpoint(step_path(tmp_path / "run", 2))["model_state_dict"]
    assert all(p.equal(frozen[name]) and p.equal(stored[name]) for name, p in parameters(trainer).items())
    trainer.stop() if end == "stop" else trainer.controls.resume()
    thread.join(20)
    assert not thread.is_alive() and trainer.step == (6 if end == "resume" else 2)
    rows, unpaused = (without_times(read_record(run_dir)) for run_dir in (tmp_path / "run", run.run_dir))
    assert rows == unpaused[: len(rows)]


@pytest.mark.parametrize("asked_at", [2, 3])
def test_a_scale_survives_a_kill(run: Trainer, tmp_path: Path, asked_at: int) -> None:
    """Even one that is asked for when the last checkpoint, of step 3, is written already."""
    trainer = Trainer(run.config, tmp_path / "run")
    for report in trainer.steps(until=4):
        if report.step == 3:
            trainer.save(step_path(trainer.run_dir, 3))
        if report.step == asked_at:
            trainer.controls.set_lr_scale(0.25)
    resumed = Trainer(run.config, tmp_path / "run", resume=True)
    (again,) = resumed.steps(until=4)
    assert again.lr == report.lr and resumed.controls.lr_scale == 0.25
    assert controls_of(tmp_path / "run") == [{"step": asked_at, "action": "lr_scale", "value": 0.25}]


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_a_scale_that_is_none(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^lr_scale=.* must be more than 0$"):
        Controls().set_lr_scale(scale)


def test_who_looks_changes_neither_record_nor_weights(run: Trainer, tmp_path: Path) -> None:
    """Readings are fetched for him sooner, and that is all."""
    fetched = []
    trainer = Trainer(run.config.with_(training={"log_interval": 3}), tmp_path / "run")
    flush = trainer.flush
    trainer.flush = lambda: (fetched.append((trainer.step, len(trainer.readings.waiting))), flush())
    trainer.listeners.append(lambda row: setattr(trainer.controls, "looks", True))
    trainer.fit()
    assert {step for step, waiting in fetched if waiting} == {*range(1, 7)}  # not 3 and 6 alone
    assert without_times(steps_of(tmp_path / "run")) == without_times(steps_of(run.run_dir))
    assert all(p.equal(parameters(trainer)[name]) for name, p in parameters(run).items())


def test_another_act_is_done_between_two_updates_written_and_repeated(run: Trainer, tmp_path: Path) -> None:
    done = []
    for folder, step in (("first", 2), ("again", None)):
        trainer = Trainer(run.config, tmp_path / folder)
        trainer.controls.acts["cut"] = lambda trainer=trainer: done.append(trainer.step)
        if step is None:
            trainer.controls.replay(tmp_path / "first" / "controls.jsonl")
        else:
            trainer.controls.scheduled.append({"step": step, "action": "cut"})
        trainer.fit()
        assert controls_of(tmp_path / folder) == [{"step": 2, "action": "cut"}]
    assert done == [2, 2]


def test_pauses_and_saves_are_no_training_time(tmp_path: Path, monkeypatch) -> None:
    """On a clock of the test's own, on which an update takes 1 s, a save 100 s, a pause 1000 s, an evaluation 10 s."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def takes(seconds: float, call):
        def slow(*given, **options):
            now[0] += seconds
            return call(*given, **options)

        return slow

    monkeypatch.setattr(loop, "evaluate", takes(10, loop.evaluate))
    monkeypatch.setattr(loop.ckpt, "save_atomically", takes(100, loop.ckpt.save_atomically))
    config = tiny(tmp_path, training={"log_interval": 1, "save_interval": 2, "eval_interval": 100})
    trainer = Trainer(config, tmp_path / "run")
    trainer.model.report = takes(0.5, trainer.model.report)  # of 2 micro-batches
    trainer.listeners.append(lambda row: row["step"] == 3 and trainer.controls.pause())

    def ends_the_pause(seconds: float) -> bool:
        now[0] += 1000
        trainer.controls.resume()

    monkeypatch.setattr(trainer.controls, "wait_while_paused", ends_the_pause)
    summary = trainer.fit()
    assert now[0] == 6 * 1 + 3 * 100 + 1000 + 2 * 10
    assert [row["tokens_per_s"] for row in steps_of(tmp_path / "run")] == [config.tokens_per_step / 1] * 6
    assert [row["seconds"] for row in steps_of(tmp_path / "run")] == [11, 12, 13, 14, 15, 16]
    assert summary["wall_s"] == 26.0


def test_a_directory_opened_on_one_thread_is_trained_in_on_another(run: Trainer, tmp_path: Path) -> None:
    """As in a notebook: a watch is made once the directory is held, and a thread trains, meanwhile or later."""
    trainer = Trainer(run.config, tmp_path / "run")
    with trainer.opened():
        assert (tmp_path / "run" / "config.yaml").exists() and trainer.step == 0
        thread = threading.Thread(target=trainer.fit)
        thread.start()
        thread.join(60)
    assert trainer.step == 6
    assert without_times(read_record(tmp_path / "run")) == without_times(read_record(run.run_dir))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_saves_and_the_second_quits(tmp_path: Path, capsys, name: str) -> None:
    number = getattr(signal, name)
    previous = signal.signal(number, signal.default_int_handler)
    try:
        once = lambda row: row["step"] == 3 and signal.raise_signal(number)  # noqa: E731
        trainer = train(tiny(tmp_path, training={"log_interval": 1}), tmp_path / "once", listeners=[once])
        assert trainer.step == 3 and "press Ctrl-C again" in capsys.readouterr().err
        assert summary_of(tmp_path / "once")["status"] == "interrupted"
        assert signal.getsignal(number) is signal.default_int_handler

        twice = lambda row: row["step"] == 3 and [signal.raise_signal(number) for _ in "12"]  # noqa: E731
        with pytest.raises(KeyboardInterrupt):
            train(tiny(tmp_path, training={"log_interval": 1}), tmp_path / "twice", listeners=[twice])
        assert summary_of(tmp_path / "twice")["status"] == "interrupted"
        assert signal.getsignal(number) is signal.default_int_handler
        assert not (tmp_path / "twice" / "checkpoints" / "checkpoint_interrupted.pt").exists()
    finally:
        signal.signal(number, previous)


def test_ctrl_c_in_a_real_process(tmp_path: Path) -> None:
    training = {"steps": 100_000, "save_interval": 2, "keep_checkpoints": 50}
    (tmp_path / "c.yaml").write_text(to_yaml(tiny(tmp_path, training=training)))
    command = [sys.executable, "-m", "moe_lab", "run", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as first:
        try:
            while not step_path(tmp_path / "run", 2).exists():
                assert first.poll() is None, first.stderr.read()
                time.sleep(0.05)
            first.send_signal(signal.SIGINT)
            out, err = first.communicate(timeout=60)
        finally:
            first.kill()
    assert first.returncode == 0 and "Traceback" not in err, err
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "interrupted" and out.startswith(f"interrupted: {summary['steps']} steps in")
    assert [row["step"] for row in steps_of(tmp_path / "run")] == list(range(1, summary["steps"] + 1))
