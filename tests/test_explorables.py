"""The number line says what torch's own bf16 addition does, and its text says what it shows."""

import math
import re

import IPython.display
import pytest
import torch
from checks import explorables, explore_03, figures_02
from checks.explorables import Choice, Slider, explore
from helpers import tiny
from matplotlib.figure import Figure

from moe_lab import build_model
from moe_lab.show.style import new_figure


@pytest.mark.parametrize("weight", [0.001, 0.02, 0.25, 1.0, 1.0078125, 3.0, 7.9])
@pytest.mark.parametrize("update", [-0.1, -2.5e-3, -(2**-9), -3e-4, 1e-6, 2**-8, 0.0035, 0.05])
def test_a_sum_is_rounded_as_torch_rounds_it(weight, update) -> None:
    s = explore_03.add_in_bf16(weight, update)
    kept = torch.tensor(weight).bfloat16()
    torch_s = kept.clone().add_(torch.tensor(update, dtype=torch.float32))  # computed in float32, stored in bf16
    assert s.weight == kept.item() and s.result == torch_s.item()
    assert s.lost == bool(torch_s == kept)
    assert s.lost == (s.low <= s.target <= s.high) or s.target in (s.low, s.high)


def test_the_stretch_that_rounds_back_ends_at_the_known_thresholds() -> None:
    s = explore_03.add_in_bf16(1.0, -3e-4)
    assert (1 - s.low, s.high - 1) == (2**-9, 2**-8)


def test_the_numbers_of_an_interval_are_those_of_bf16() -> None:
    assert explore_03.bf16_between(0.99, 1.02) == [0.9921875, 0.99609375, 1.0, 1.0078125, 1.015625]
    numbers = explore_03.bf16_between(-1.0, 1.0)
    assert numbers == sorted(set(numbers)) and numbers[0] == -1.0 and 0.0 in numbers
    assert len(numbers) == 2 * 0x3F80 + 1  # the bits of 1.0 count the positive ones up to it


@pytest.mark.parametrize("positions", [[(1.0, -3e-4)], explore_03.POSITIONS, [(0.001, -0.1), (8.0, 3e-6)]], ids=len)
def test_each_line_is_drawn_and_told(positions) -> None:
    figure, text, caption = explore_03.number_line(positions)
    assert isinstance(figure, Figure) and len(figure.axes) == len(positions) == len(text.splitlines())
    assert caption not in text
    for line, (weight, update) in zip(text.splitlines(), positions, strict=True):
        assert ("lost" in line) == explore_03.add_in_bf16(weight, update).lost


class Page:
    """What `display` shows, and later pictures of a display id."""

    def __init__(self, monkeypatch, live: str) -> None:
        self.shown, self.pictures = [], []
        monkeypatch.setenv("MOE_LAB_INTERACTIVE", live)
        monkeypatch.setattr(explorables, "moved", {})
        monkeypatch.setattr(IPython.display, "display", self.display)

    def display(self, what, **options) -> "Page":
        self.shown.append(what)
        return self

    def update(self, picture, raw) -> None:
        self.pictures.append(picture["text/plain"])


def test_headless_the_number_line_shows_the_chosen_positions(monkeypatch) -> None:
    page = Page(monkeypatch, live="0")
    explore_03.explore_number_line()
    (picture,) = page.shown
    assert picture["text/plain"].splitlines()[:4] == explore_03.number_line()[1].splitlines()


def test_sliders_redraw_the_same_figure(monkeypatch) -> None:
    page = Page(monkeypatch, live="1")
    explore_03.explore_number_line()
    box, _names, first = page.shown
    assert ": lost" in first["text/plain"]
    weight, update, way = box.children
    for widget, value, expected in ((update, 2.5e-3, "lands on 0.996"), (way, 1, ": lost"), (weight, 0.25, "lands on")):
        widget.value = value
        assert expected in page.pictures[-1]
    assert len(page.pictures) == 3


def draw_sum(first: float, second: str) -> tuple[Figure, str, str]:
    return new_figure(2, 1), f"{first:g} and {second}", "A caption."


@pytest.mark.parametrize("live", ["0", "1"])
def test_an_explorable_starts_at_its_controls_values_and_follows_them(live, monkeypatch) -> None:
    page = Page(monkeypatch, live)
    second = Choice("second", {"left": "L", "right": "R"})
    explore(draw_sum, first=Slider("first", 2.0, 0, 8, 0.5), second=second)
    assert page.shown[-1]["text/plain"] == "2 and L\nA caption."
    if live == "1":
        for widget, value in zip(page.shown[0].children, (3.5, "R"), strict=True):
            widget.value = value
        assert page.pictures == ["3.5 and L\nA caption.", "3.5 and R\nA caption."]
        explore(draw_sum, first=Slider("first", 2.0, 0, 8, 0.5), second=second)  # the cell is run again
        assert page.shown[-1]["text/plain"] == "3.5 and R\nA caption."


def test_headless_a_still_figure_stands_in_and_nothing_else_is_drawn(monkeypatch) -> None:
    page = Page(monkeypatch, live="0")
    explore(None, still=lambda: draw_sum(1, "still"), first=Slider("first", 2.0, 0, 8, 0.5))
    assert [picture["text/plain"] for picture in page.shown] == ["1 and still\nA caption."]


# ---- notebook 02's ---------------------------------------------------------------------------------------------------


def test_the_router_shows_the_loads_of_its_logits_and_the_balance_loss() -> None:
    """The three cases of the notebook: even, sure of the same two, and the same two by a hair."""
    _, text, _ = figures_02.draw_router(1.0, a=0.0, b=0.0, c=0.0, d=0.0)
    loads = [float(number) for number in re.findall(r"0\.\d\d", text.split(";")[0].split("Load")[1])]
    assert text.startswith("Balance loss 1.0") and all(0.2 < load < 0.3 for load in loads)
    _, text, _ = figures_02.draw_router(0.0, a=9.0, b=9.0, c=-9.0, d=-9.0)
    assert text == "Balance loss 2.00. Load 0.50, 0.50, 0.00, 0.00; mean probability 0.50, 0.50, 0.00, 0.00."
    _, text, _ = figures_02.draw_router(0.0, a=0.001, b=0.001, c=0.0, d=0.0)
    assert text == "Balance loss 1.00. Load 0.50, 0.50, 0.00, 0.00; mean probability 0.25, 0.25, 0.25, 0.25."


def test_a_changed_token_is_heard_where_its_row_says(monkeypatch) -> None:
    change = torch.zeros(5, 5)
    change[2] = torch.tensor([0.0, 0.3, 1.0, 0.0, 0.01])
    _, text, _ = figures_02.draw_hearers(list("abcde"), {("MoD", "training"): change}, "MoD", "training", 2)
    assert text == "MoD, training: token 2 changes; 1 of 2 later places hear of it; earlier places that do: 1."
    page = Page(monkeypatch, live="0")
    figures_02.show_causality({("MoD", "training"): change, ("MoD", "evaluation"): change.triu()})
    assert "MoD in training (1 cells)." in page.shown[0]["text/plain"]


@pytest.mark.parametrize("capacity", [0.1, 0.25, 0.75, 1.0])
def test_capacity_is_the_share_of_tokens_that_a_sublayer_computes(capacity) -> None:
    model = build_model(tiny(mod_enabled=True)).train()
    ids = torch.arange(20)[None]
    chosen = figures_02.choices(model, ids, capacity)
    assert chosen.shape == (4, 20) and (chosen.sum(axis=1) == math.ceil(capacity * 20)).all()
    _, text, caption = figures_02.draw_depth(chosen, ["s"] * 4, ["t"] * 20, capacity)
    n = math.ceil(capacity * 20)
    assert f"computes {n} of 20 tokens" in text and f"{n * (n + 1) // 2} of 210 pairs" in caption
    assert f"{chosen.all(axis=0).sum()} tokens are computed by all, {(~chosen).all(axis=0).sum()} by none" in text


def test_a_logarithmic_slider_can_stand_where_it_starts() -> None:
    """A browser moves a value to the nearest step from the least one: 192 would become 181."""
    for value, low, high, step, base in ((192, 5, 13, 0.25, 2), (0.02, -5, 0, 0.05, 10), (64, 5, 13, 0.25, 2)):
        widget = Slider("width", value, low, high, step, base).widget()
        steps = (math.log(value, base) - widget.min) / step
        assert steps == pytest.approx(round(steps), abs=1e-6) and low <= widget.min < low + step
        assert widget.value == pytest.approx(value)
