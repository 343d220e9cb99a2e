"""Figures, their descriptions, and the dashboard without a browser (tests/browser has the one with)."""

import asyncio
import re
import threading
import time

import pytest
from browser.fake_trainer import FakeTrainer, eval_row, step_row
from checks.pair import LivePair
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from tiny_run import tiny, without_times

from moe_lab import Trainer
from moe_lab.health.findings import Finding
from moe_lab.show import dashboard, live
from moe_lab.show.front import is_interactive
from moe_lab.show.live import LiveRun, observing
from moe_lab.show.style import SERIES
from moe_lab.train.record import RECORD, append_jsonl, read_record


@pytest.fixture(scope="module")
def shell():
    """Outside a kernel `display` has handles to update only in an IPython shell."""
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.fixture
def headless(shell, monkeypatch) -> None:
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")


@pytest.fixture
def watched(shell, monkeypatch) -> None:
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "1")
    monkeypatch.setattr(dashboard, "REDRAW_S", 0.03)


@pytest.fixture
def in_a_script(monkeypatch) -> None:
    """No shell, and so no handles; a front end is guessed none the less, as in an editor's terminal."""
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "1")
    monkeypatch.setattr(dashboard, "get_ipython", lambda: None)
    monkeypatch.setattr(dashboard, "display", lambda *shown, **options: print(*shown))


def finished(trainer: FakeTrainer) -> LiveRun:
    run = LiveRun(trainer).start()
    asyncio.run(run.finished())
    return run


def test_interactive_is_decided_by_our_variable_then_the_front_ends(monkeypatch) -> None:
    for name in ("MOE_LAB_INTERACTIVE", "JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    assert not is_interactive()
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert is_interactive()
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    assert not is_interactive()


@pytest.mark.parametrize("mode", ["headless", "watched"])
def test_both_modes_give_the_trainers_rows_and_train_off_the_main_thread(mode, request) -> None:
    request.getfixturevalue(mode)
    run = finished(FakeTrainer())
    assert run.training.result() == {"status": "finished", "steps": 20}
    assert run.rows == [eval_row(0), *map(step_row, range(1, 21)), eval_row(20)]
    assert run.trainer.thread is not threading.main_thread()


def test_a_resumed_run_begins_where_its_record_does(headless, tmp_path) -> None:
    append_jsonl(tmp_path / RECORD, [eval_row(0), *map(step_row, range(1, 9))])
    run = finished(FakeTrainer(run_dir=tmp_path, step=6))  # what lies beyond the checkpoint is made again
    assert [row["step"] for row in run.rows if "loss" in row] == list(range(1, 21))


def test_buttons_and_slider_reach_the_trainers_controls(watched) -> None:
    run = LiveRun(FakeTrainer(n_steps=10**6)).start()
    pause, stop, checkpoint, slider = run._box.children[0].children
    controls = run.trainer.controls
    pause.click()
    assert (controls.paused, pause.description) == (True, "Resume")
    pause.click()
    assert (controls.paused, pause.description) == (False, "Pause")
    slider.value = 2.0
    checkpoint.click()
    stop.click()
    assert asyncio.run(run.finished())["status"] == "interrupted"
    asked = controls.take(step=1)
    assert [row["action"] for row in asked] == ["pause", "resume", "lr_scale", "save", "stop"]
    assert asked[2]["value"] == 2.0


def test_no_empty_axes_stand_there_before_the_first_update(watched, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(LiveRun, "figure", lambda run: drawn.append(run.trainer.step) or (Figure(), ""))
    finished(FakeTrainer(n_steps=3, step_s=0.2))
    assert drawn and min(drawn) > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_figure_that_cannot_be_drawn_does_not_stop_the_training(watched, monkeypatch) -> None:
    monkeypatch.setattr(live, "training_figure", lambda *_: 1 / 0)
    run = LiveRun(FakeTrainer(n_steps=50)).start()
    with pytest.raises(ZeroDivisionError):
        asyncio.run(run.finished())
    assert run.training.result() == {"status": "finished", "steps": 50}


def test_starting_again_stops_the_run_before(headless) -> None:
    first = LiveRun(FakeTrainer(n_steps=10**6)).start()
    second = finished(FakeTrainer())
    assert first.training.result()["status"] == "interrupted"
    assert second.training.result()["status"] == "finished"
    assert dashboard._active is second


@pytest.mark.parametrize("mode", ["headless", "in_a_script"])
def test_progress_is_told_by_the_waiting_cell(mode, request, capsys) -> None:
    request.getfixturevalue(mode)
    finished(FakeTrainer(n_steps=25, step_s=0.01))
    out, err = capsys.readouterr()
    assert (out == "") == (mode == "in_a_script")  # nothing is shown
    told = [line for line in err.splitlines() if "%" in line]
    assert 3 <= len(told) <= 10
    assert re.search(r"^ *\d+ %  running · step \d+/25 · last batch \d\.\d+ · 6,000 tokens/s", told[0])


def test_an_error_in_the_worker_is_raised_by_the_waiting_cell(headless) -> None:
    with pytest.raises(FloatingPointError, match="loss is nan in step 5"):
        finished(FakeTrainer(fails_at=5))


def test_a_cancelled_wait_stops_the_run_gracefully(headless) -> None:
    async def interrupted() -> dict:
        task = asyncio.ensure_future(LiveRun(FakeTrainer(n_steps=10**6)).start().finished())
        await asyncio.sleep(0.02)
        task.cancel()
        return await task

    assert asyncio.run(interrupted())["status"] == "interrupted"


def test_an_evaluation_is_not_silent(headless, monkeypatch, capsys) -> None:
    """A line comes every SILENT_S while one goes on, and says how far it is."""
    monkeypatch.setattr(dashboard, "SILENT_S", 0.02)
    trainer = FakeTrainer(n_steps=3)
    run_steps = trainer.fit

    def fit() -> dict:
        for share in (0.25, 0.75):
            trainer.controls.evaluated = share
            threading.Event().wait(0.3)
        trainer.controls.evaluated = 1.0
        return run_steps()

    monkeypatch.setattr(trainer, "fit", fit)
    finished(trainer)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "evaluating, 25%" in line]
    assert [line for line in lines if "evaluating, 75%" in line]
    assert "evaluating" not in lines[-1]


class FakeWatch:
    """Finds something in the steps that it is told of, as a watch does: on the training's thread."""

    def __init__(self, *at: int):
        self.at, self.findings, self.readings, self.told = at or (5,), [], [], 0

    def observe(self, *, loss: float) -> None:
        self.told += 1
        if self.told in self.at:
            message, advice = f"{79 + self.told} % < all of it", "keep them in float32"
            self.findings.append(Finding("lost_updates", "error", "a.weight", message, advice, step=self.told))


def test_findings_are_told_as_they_come_and_stand_in_red_under_the_figure(headless, capsys) -> None:
    run = LiveRun(FakeTrainer(n_steps=40, step_s=0.01), watch=FakeWatch()).start()
    asyncio.run(run.finished())
    lines = capsys.readouterr().err.splitlines()
    said = [n for n, line in enumerate(lines) if line.startswith("error: lost_updates: 84 % < all of it (step 5)")]
    assert len(said) == 1 and said[0] < len(lines) - 2  # and the run went on
    bundle = run._bundle()
    red = f"color:{dashboard.RED}[^>]*>error: lost_updates at step 5:</strong> 84 % &lt; all of it. keep"
    assert re.search(red, bundle["text/html"])
    assert "error: lost_updates at step 5" in bundle["text/plain"].splitlines()[1]  # marked in the figure


def test_a_rule_stands_once_under_the_figure_with_its_first_step_and_a_count(headless) -> None:
    """Also in the figure and its description."""
    run = LiveRun(FakeTrainer(n_steps=40), watch=FakeWatch(5, 12, 17)).start()
    run.watches["later"] = FakeWatch()
    asyncio.run(run.finished())
    run.watches["later"].findings.append(run.findings()[1][1])
    run.watches[""].findings.insert(0, Finding("lr_too_low", "warning", "loss", "low", "", step=3))
    page, plain = (run._bundle()[kind] for kind in ("text/html", "text/plain"))
    assert page.count("lost_updates at step 5 (4 findings):</strong> 84 %") == page.count("all of it") == 1
    assert "\nerror: lost_updates at step 5 (4 findings): 84 %" in plain  # also of the watch without a name
    assert plain.endswith("\nwarning: lr_too_low at step 3: low.")  # errors come first
    marks = {(5, "error: lost_updates"), (3, "warning: lr_too_low")}
    assert {mark[:2] for mark in live.found_by(run.watches[""])} == marks


def test_a_live_figures_caption_says_what_it_means_and_its_alternative_text_what_is_seen(headless, tmp_path) -> None:
    run = finished(FakeTrainer())
    pair = LivePair({name: Trainer(tiny(tmp_path), tmp_path / name) for name in "ab"})
    for live_run in (run, pair):
        page, (_, seen) = live_run._bundle()["text/html"], live_run.figure()
        assert f'alt="{seen}' in page and f"<figcaption>{live_run.caption}</figcaption>" in page
        assert seen.splitlines()[0] not in live_run.caption


def test_a_watch_is_told_the_losses_at_the_same_steps_however_often_somebody_looks() -> None:
    watch = FakeWatch()
    listen, told = observing(watch, every=10, last=25), []
    for step in range(1, 26):
        listen(step_row(step))
        told.append(watch.told)
    assert told == [0] * 9 + [10] * 10 + [20] * 5 + [25]


def test_the_status_says_what_is_going_on(headless) -> None:
    run = LiveRun(FakeTrainer())
    trainer, controls = run.trainer, run.trainer.controls
    assert run.status() == "running · step 0/20"
    controls.evaluated = 0.25
    assert run.status() == "evaluating, 25% · step 0/20"
    controls.evaluated, trainer.step = 1.0, 7
    run.rows.append(step_row(5) | {"lr": {"muon": 0.01, "adamw": 0.0016}})
    controls.lr_scale, controls.saved = 0.5, "step_000006.pt"
    assert run.status().startswith("running · step 7/20 · last batch 7.")
    assert run.status().endswith(" · LR of muon 0.01 · LR × 0.5 · saved step_000006.pt")
    controls.pause()
    assert run.status().startswith("paused · step 7/20")
    controls.stop()
    assert run.status().startswith("stopping · step 7/20")


def test_changes_and_checkpoints_are_marked(headless, tmp_path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_000012.pt").touch()
    actions = [{"step": 4, "action": "pause"}, {"step": 6, "action": "lr_scale", "value": 0.5}]
    append_jsonl(tmp_path / "controls.jsonl", actions)
    run = finished(FakeTrainer(run_dir=tmp_path))
    figure, description = run.figure()
    named = [text.get_text() for text in figure.axes[0].texts if text.get_rotation() == 90]
    assert named == ["LR × 0.5", "saved"]
    assert description.endswith("; LR × 0.5 at step 6; saved at step 12.")
    assert [line.get_xdata()[0] for line in figure.axes[2].get_lines() if line.get_linestyle() == ":"] == [6, 12]


def test_a_run_is_shown_again_with_its_controls_and_afterwards_as_a_picture(watched, monkeypatch) -> None:
    shown = []
    run = LiveRun(FakeTrainer(n_steps=10**6)).start()
    monkeypatch.setattr(dashboard, "display", lambda what, **options: shown.append(what))
    run.show()
    assert shown == [run._box]
    run.stop()
    asyncio.run(run.finished())
    run.show()
    assert "moe-still" not in shown[1]["text/html"] and "<img" in shown[1]["text/html"]
    assert run._box.children == (run._status, run._image)  # what a page shows that was loaded again meanwhile
    assert "interrupted" in run._status.value and "<img" in run._image.value


def test_buttons_answer(watched) -> None:
    run = LiveRun(FakeTrainer(n_steps=10**6), acts={"cut": lambda run: None}).start()
    pause, stop, checkpoint, _ = run._box.children[0].children
    checkpoint.click()
    assert run._status.value.endswith("saved …")
    run._box.children[1].children[1].click()
    stop.click()
    assert run._status.value.startswith("stopping")
    assert pause.disabled and stop.disabled and checkpoint.disabled
    asyncio.run(run.finished())
    assert [row["action"] for row in run.trainer.controls.take(1)] == ["save", "cut", "stop"]


@pytest.mark.parametrize("mode", ["headless", "watched"])
def test_a_pair_is_trained_in_turn_and_each_as_if_alone(mode, request, tmp_path) -> None:
    request.getfixturevalue(mode)
    config, runs = tiny(tmp_path), {}
    for name, lr in (("high", 0.02), ("low", 0.0006)):
        runs[name] = config.with_(training={"max_lr": lr, "eval_interval": 3})
        Trainer(runs[name], tmp_path / f"{name} alone").fit()
    pair = LivePair({name: Trainer(runs[name], tmp_path / name) for name in runs}).start()
    rows = asyncio.run(pair.finished())
    for name in runs:
        alone = without_times(read_record(tmp_path / f"{name} alone"))
        assert without_times(rows[name]) == alone == without_times(read_record(tmp_path / name))
    assert rows["high"] != rows["low"]
    assert pair.state() == "finished"
    figure, description = pair.figure()
    assert re.match(r"high: step 6, training loss \d\.\d+, norm weights .*\nlow: step 6, training loss", description)
    assert {line.get_color() for line in figure.axes[0].get_lines()} >= {SERIES[0][0], SERIES[1][0]}


def test_a_pair_can_be_stopped(headless, tmp_path) -> None:
    config = tiny(tmp_path)
    pair = LivePair({name: Trainer(config, tmp_path / name) for name in "ab"}, until=4)
    pair.trainers[0].listeners.append(lambda row: row["step"] == 2 and pair.stop())
    asyncio.run(pair.start().finished())
    assert pair.state() == "interrupted" and max(trainer.step for trainer in pair.trainers) == 2


def test_what_either_watch_of_a_pair_finds_is_told_once(headless, tmp_path, capsys) -> None:
    config = tiny(tmp_path)
    pair = LivePair({name: Trainer(config, tmp_path / name) for name in "ab"}, until=4)

    def find(name: str, rule: str) -> None:
        pair.watches[name].findings.append(Finding(rule, "info", "loss", f"planted in {name}", "", step=1))
        time.sleep(0.3)  # until it is told

    finds = {1: ("b", "lr_too_low"), 2: ("a", "no_gradient")}
    pair.trainers[0].listeners.append(lambda row: "loss" in row and row["step"] in finds and find(*finds[row["step"]]))
    asyncio.run(pair.start().finished())
    told = [line.partition(" (step")[0] for line in capsys.readouterr().err.splitlines() if "planted" in line]
    assert told == ["b info: lr_too_low: planted in b", "a info: no_gradient: planted in a"]
