"""Figures, their descriptions, and the dashboard without a browser (tests/browser has the one with)."""

import asyncio
import base64
import io
import re
import threading

import numpy as np
import pytest
from browser.fake_trainer import FakeTrainer, eval_row, step_row
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from moe_lab.config import Config
from moe_lab.show import live
from moe_lab.show.live import LiveRun, is_interactive
from moe_lab.show.plots import last_tick, loss_bars, smooth, thin, training_figure
from moe_lab.show.style import save, to_html

FLOORS = {"uniform": 8.32, "unigram": 6.61, "bigram": 4.49, "trigram": 4.08}
MANY = [eval_row(0), *(step_row(step) for step in range(1, 1501)), eval_row(1500)]


@pytest.fixture
def shell():
    """Outside a kernel `display` has handles to update only in an IPython shell."""
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def of_steps(n: int) -> Config:
    """Of a run with one head, so that the next token's loss has the weight 1."""
    return Config().with_(model={"n_pred_tokens": 1, "aux_loss_weights": (1.0,)}, training={"steps": n})


def wait(run: LiveRun) -> dict:
    return asyncio.run(run.finished())


@pytest.mark.parametrize("rows", [[], [eval_row(0)], [step_row(1)], MANY], ids=["none", "eval", "one", "many"])
@pytest.mark.parametrize("floors", [None, FLOORS], ids=["no floors", "floors"])
def test_the_figure_draws_whatever_there_is(rows, floors, tmp_path) -> None:
    figure, description = training_figure(rows, floors, of_steps(1500))
    assert Image.open(save(figure, tmp_path / "figure.png")).size == (800, 480)
    assert len(description.splitlines()) == 2
    assert all(len(line.get_xdata()) <= 1000 for axes in figure.axes for line in axes.get_lines())


@pytest.mark.parametrize(
    "change",
    [
        {"norm_deviation": 0.0},
        {"grad_norm": float("nan")},
        {"expert_load": []},
        {"losses": {"next_token": float("nan")}},
    ],
    ids=str,
)
def test_sick_readings_are_drawn_too(change) -> None:
    figure, _ = training_figure([step_row(step) | change for step in range(1, 20)], FLOORS, of_steps(20))
    figure.canvas.draw()
    words = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
    assert ("exactly 0" in words) == ("norm_deviation" in change)


def test_the_description_says_the_numbers_of_the_rows() -> None:
    last = step_row(7) | {"expert_load": [[0.25] * 4, [0.1, 0.6, 0.2, 0.1]], "grad_norm": 0.5, "norm_deviation": 0.004}
    last["losses"]["next_token"] = 3.5
    evaluation = eval_row(7) | {"validation_loss": 4.0}
    _, description = training_figure([step_row(6), last, evaluation], FLOORS, of_steps(10))
    assert description == (
        "Step 7 of 10: training loss 3.500 nats per token, validation loss 4.000 at step 7, "
        "0.080 below the trigram table (4.080).\n"
        "Norm weights moved by up to 0.004; gradient norm 0.5; "
        "busiest expert: MoE layer 1, expert 1, 2.40 times the even share."
    )


def test_the_next_tokens_loss_is_shown_without_its_weight() -> None:
    config = Config().with_(model={"n_pred_tokens": 2, "aux_loss_weights": (1.0, 0.5)}, training={"steps": 10})
    row = step_row(1) | {"losses": {"next_token": 4.0, "future_2": 2.0}}
    figure, description = training_figure([row], FLOORS, config)
    assert "training loss 6.000" in description
    assert "training 6.00" in [text.get_text() for text in figure.axes[0].texts]
    assert row["losses"]["next_token"] == 4.0


@pytest.mark.parametrize(("step", "end"), [(0, 12.5), (30, 50), (100, 100), (101, 200), (800, 800)])
def test_the_axis_of_steps_grows_by_doubling(step, end) -> None:
    assert last_tick(np.array([float(step)]), 800) == end


def test_loss_bars_order_and_compare() -> None:
    figure, description = loss_bars(FLOORS, {"healthy": 3.81, "sick": 6.6})
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [
        *("uniform", "unigram", "sick", "bigram", "trigram", "healthy")
    ]
    assert description.endswith("The best model, healthy, is 0.270 below the lowest floor, trigram.")
    assert loss_bars({}, {})[1].endswith("No model yet.")


def test_thinning_keeps_spikes_and_the_last_point() -> None:
    x, y = np.arange(50_000.0), np.zeros(50_000)
    y[12_345], y[-1] = 9.0, 1.0
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 1000
    assert thin_y.max() == 9.0
    assert thin_x[-1] == 49_999


def test_smoothing_keeps_a_straight_line_at_the_start() -> None:
    line = np.arange(200.0)
    assert np.allclose(smooth(line)[:150], line[:150])


def test_html_has_the_description_and_a_small_palette_picture() -> None:
    bundle = to_html(training_figure(MANY, FLOORS, of_steps(1500))[0], "a < b\nsecond line")
    assert 'alt="a &lt; b\nsecond line"' in bundle["text/html"]
    assert "<figcaption>a &lt; b<br>second line</figcaption>" in bundle["text/html"]
    picture = base64.b64decode(re.search('base64,([^"]+)', bundle["text/html"])[1])
    assert Image.open(io.BytesIO(picture)).mode == "P"
    assert len(picture) < 40_000


def test_interactive_is_decided_by_our_variable_then_the_front_ends(monkeypatch) -> None:
    for name in ("MOE_LAB_INTERACTIVE", "JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    assert not is_interactive()
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert is_interactive()
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    assert not is_interactive()


def test_both_modes_give_the_same_rows_and_train_off_the_main_thread(shell) -> None:
    interactive = LiveRun(FakeTrainer(), every_s=0.01, controls=True).start()
    summary = wait(interactive)
    headless = LiveRun(FakeTrainer(), controls=False).start()
    assert wait(headless) == summary == {"status": "finished", "steps": 20}
    assert interactive.rows == headless.rows
    assert len(headless.rows) == 22
    assert all(run.trainer.thread is not threading.main_thread() for run in (interactive, headless))


def test_buttons_and_slider_reach_the_trainers_controls(shell) -> None:
    run = LiveRun(FakeTrainer(n_steps=10**6), every_s=0.01, controls=True).start()
    pause, stop, checkpoint, slider = run._box.children[0].children
    controls = run.trainer.controls
    pause.click()
    assert (controls.paused, pause.description) == (True, "Resume")
    pause.click()
    assert (controls.paused, pause.description) == (False, "Pause")
    slider.value = 2.0
    checkpoint.click()
    stop.click()
    assert wait(run)["status"] == "interrupted"
    assert (controls.lr_scales, controls.saves) == ([2.0], 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_figure_that_cannot_be_drawn_does_not_stop_the_training(shell, monkeypatch) -> None:
    monkeypatch.setattr(live, "training_figure", lambda *_, **__: 1 / 0)
    run = LiveRun(FakeTrainer(n_steps=50), every_s=0.01, controls=True).start()
    with pytest.raises(ZeroDivisionError):
        wait(run)
    assert run.summary == {"status": "finished", "steps": 50}


def test_starting_again_stops_the_run_before() -> None:
    first = LiveRun(FakeTrainer(n_steps=10**6), controls=False).start()
    second = LiveRun(FakeTrainer(), controls=False).start()
    assert first.summary["status"] == "interrupted"
    assert wait(second)["status"] == "finished"
    assert live._active is second


def test_headless_progress_is_told_by_the_waiting_cell(capsys) -> None:
    wait(LiveRun(FakeTrainer(n_steps=50, step_s=0.02), controls=False).start())
    told = [line for line in capsys.readouterr().err.splitlines() if "%" in line]
    assert 3 <= len(told) <= 10
    assert re.search(r"^ *\d+ %  running · step \d+/50 · loss \d\.\d+ · 6,000 tokens/s", told[0])


def test_an_error_in_the_worker_is_raised_by_the_waiting_cell() -> None:
    run = LiveRun(FakeTrainer(fails_at=5), controls=False).start()
    with pytest.raises(FloatingPointError, match="loss is nan in step 5"):
        wait(run)


def test_a_cancelled_wait_stops_the_run_gracefully() -> None:
    async def interrupted() -> dict:
        run = LiveRun(FakeTrainer(n_steps=10**6), controls=False).start()
        task = asyncio.ensure_future(run.finished())
        await asyncio.sleep(0.1)
        task.cancel()
        return await task

    assert asyncio.run(interrupted())["status"] == "interrupted"
