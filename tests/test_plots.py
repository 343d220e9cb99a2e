"""Figures of a run and of two, and how one becomes a cell's output."""

import base64
import io
import itertools
import re

import numpy as np
import pytest
from browser.fake_trainer import eval_row, step_row
from checks.figures_05 import time_figure
from checks.pair import pair_figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from moe_lab.config import Config
from moe_lab.show.plots import smooth, training_figure
from moe_lab.show.style import GREY, INK, LARGEST_SVG, LETTERS, SERIES, label_right, new_axes, new_figure, png, to_html

FLOORS = {"uniform": 8.32, "unigram": 6.61, "bigram": 4.49, "trigram": 4.08}
MANY = [eval_row(0), *(step_row(step) for step in range(1, 1501)), eval_row(1500)]


def of_steps(n: int) -> Config:
    """Of a run with one head, so that the next token's loss has the weight 1."""
    model = {"n_pred_tokens": 1, "aux_loss_weights": (1.0,), "moe_layers": (1, 3)}
    return Config().with_(model=model, training={"steps": n})


@pytest.mark.parametrize("rows", [[], [eval_row(0)], [step_row(1)], MANY], ids=["none", "eval", "one", "many"])
@pytest.mark.parametrize("floors", [{}, FLOORS], ids=["no floors", "floors"])
def test_the_figure_draws_whatever_there_is(rows, floors) -> None:
    figure, description = training_figure(rows, floors, of_steps(1500))
    assert Image.open(io.BytesIO(png(figure))).size == (1600, 960)  # two pixels for one
    assert len(description.splitlines()) == 2


def test_sick_readings_are_drawn_too() -> None:
    nan = float("nan")
    sick = {"norm_deviation": 0.0, "grad_norm": nan, "expert_load": [], "losses": {"next_token": nan}}
    for name, value in sick.items():
        figure, _ = training_figure([step_row(step) | {name: value} for step in range(1, 20)], FLOORS, of_steps(20))
        figure.draw_without_rendering()
        words = " ".join(text.get_text() for axes in figure.axes for text in axes.texts)
        assert ("exactly 0" in words) == (name == "norm_deviation")


def test_the_description_says_the_numbers_of_the_rows() -> None:
    last = step_row(7) | {"expert_load": [[0.25] * 4, [0.1, 0.6, 0.2, 0.1]], "grad_norm": 0.5, "norm_deviation": 0.004}
    last["losses"]["next_token"] = 3.5
    evaluation = eval_row(7) | {"validation_loss": 4.0}
    first = step_row(6) | {"losses": {"next_token": 3.0}}
    _, description = training_figure([first, last, evaluation], FLOORS, of_steps(10))
    assert description == (
        "Step 7 of 10: training loss 3.250 nats per token, a mean of the last updates, validation loss 4.000 at step 7, "
        "0.080 below the trigram table (4.080).\n"
        "Norm weights moved by up to 0.004; gradient norm 0.5; "
        "busiest expert: MoE layer 3, expert 1, 2.40 times the even share."
    )


def test_the_next_tokens_loss_is_shown_without_its_weight() -> None:
    config = of_steps(10).with_(model={"n_pred_tokens": 2, "aux_loss_weights": (1.0, 0.5)})
    row = step_row(1) | {"losses": {"next_token": 4.0, "future_2": 2.0}}
    figure, description = training_figure([row], FLOORS, config)
    assert "training loss 6.000" in description
    assert "training 6.00" in [text.get_text() for text in figure.axes[0].texts]
    assert row["losses"]["next_token"] == 4.0


def test_smoothing_keeps_a_straight_line_at_the_start() -> None:
    line = np.arange(200.0)
    assert np.allclose(smooth(line)[:150], line[:150])


def picture_of(bundle: dict[str, str]) -> tuple[str, bytes]:
    """Kind and bytes of the picture in a MIME bundle."""
    kind, data = re.search('src="data:image/([a-z+]+);base64,([^"]+)', bundle["text/html"]).groups()
    return kind, base64.b64decode(data)


def test_a_picture_has_an_alt_text_and_a_caption_that_says_something_else() -> None:
    bundle = to_html(new_figure(2, 1), "a < b\nsecond line", 'what "it" means')
    assert 'alt="a &lt; b\nsecond line"' in bundle["text/html"]
    assert "<figcaption>what &quot;it&quot; means</figcaption>" in bundle["text/html"]
    assert bundle["text/plain"] == 'a < b\nsecond line\nwhat "it" means'


def test_one_text_for_both_is_read_once_by_a_screen_reader() -> None:
    page = to_html(new_figure(2, 1), "a < b\nsecond line")["text/html"]
    assert 'alt="a &lt; b\nsecond line"' in page
    assert '<figcaption aria-hidden="true">a &lt; b<br>second line</figcaption>' in page


def test_lines_become_an_svg_with_readable_text_on_white_and_many_points_a_png_of_few_colours() -> None:
    figure = training_figure(MANY, FLOORS, of_steps(1500))[0]
    bundle = to_html(figure, "a run")
    kind, data = picture_of(bundle)
    assert kind == "svg+xml" and len(data) <= LARGEST_SVG
    assert b">Loss</text>" in data and b"fill: #ffffff" in data  # text is text, and the paper is white
    assert to_html(training_figure(MANY, FLOORS, of_steps(1500))[0], "a run") == bundle  # nothing random in it
    cloud = new_figure(4, 4)
    points = np.random.default_rng(0).normal(size=(2, 20_000))
    cloud.add_axes((0, 0, 1, 1)).scatter(*points, c=points[0])
    kind, data = picture_of(to_html(cloud, "a cloud"))
    image = Image.open(io.BytesIO(data))
    assert (kind, image.mode, image.size) == ("png", "P", (640, 640))  # two pixels for one


def test_letters_stand_out_from_white_paper() -> None:
    def luminance(colour: str) -> float:
        """Of the web's contrast ratio. https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    for colour in (INK, GREY, *(LETTERS.get(colour, colour) for colour, _, _ in SERIES)):
        assert 1.05 / (luminance(colour) + 0.05) >= 4.5, colour


def test_the_loss_over_time_says_when_each_table_was_passed() -> None:
    rows = [step_row(step) | {"seconds": 6.0 * step} for step in range(1, 21)]
    rows += [
        eval_row(step) | {"seconds": 6.0 * step, "validation_loss": loss}
        for step, loss in ((0, 8.3), (10, 6.0), (20, 4.2))
    ]
    figure, description, _ = time_figure(rows, FLOORS, of_steps(20))
    curves = [line.get_xdata() for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 20]
    assert all(list(curve) == pytest.approx([0.1 * step for step in range(1, 21)]) for curve in curves)
    assert len(curves) == 2
    passed = "below uniform after 0.0 minutes; below unigram after 1.0 minutes; below bigram after 2.0 minutes"
    assert description == f"2.0 minutes in all. The validation loss was {passed}."
    rows[-2]["validation_loss"] = 8.0  # one evaluation finds two tables passed
    assert "below unigram, bigram after 2.0 minutes." in time_figure(rows, FLOORS, of_steps(20))[1]


def test_labels_stand_at_their_values_on_any_scale() -> None:
    for scale, options in (("linear", {}), ("log", {}), ("symlog", {"linthresh": 0.1})):
        axes = new_axes(new_figure(), (0.1, 0.1, 0.5, 0.8), "", "", "")
        axes.set_yscale(scale, **options)
        axes.set_ylim(0.01, 100)
        label_right(axes, [(7, "low", INK), (60, "high", INK)])
        for text, value in zip(axes.texts, (7, 60), strict=True):
            drawn = axes.transAxes.transform(text.get_position())[1]
            assert drawn == pytest.approx(axes.transData.transform((0, value))[1]), scale


def test_the_scale_is_the_losses_and_of_the_floors_those_that_are_near() -> None:
    sick = [step_row(step) for step in range(1, 101)]
    for row in sick:
        row["losses"] = {"next_token": 8.3 - 0.015 * row["step"]}
    low, high = training_figure(sick, FLOORS, of_steps(100))[0].axes[0].get_ylim()
    assert low > FLOORS["bigram"] and low < FLOORS["unigram"] < FLOORS["uniform"] < high
    healthy = training_figure(MANY, FLOORS, of_steps(1500))[0].axes[0].get_ylim()
    assert healthy[0] < FLOORS["trigram"]


def test_what_arrives_stands_beside_the_norms() -> None:
    figure, description = training_figure(MANY, FLOORS, of_steps(1500), arrived={"the norms'": 0.0, "all": 0.84})
    said = "updates that arrive: 0% of the norms', 84% of all"
    assert said in [text.get_text() for text in figure.axes[1].texts] and said in description


def test_words_at_one_step_stand_beside_each_other() -> None:
    marks = {name: [(3, f"error: {rule}", INK) for rule in ("lost_updates", "no_gradient")] for name in "ab"}
    rows = {name: [step_row(step) for step in range(1, 7)] for name in "ab"}
    figure, _ = pair_figure(rows, FLOORS, of_steps(6), marks)
    renderer = FigureCanvasAgg(figure).get_renderer()
    places = [text.get_window_extent(renderer) for text in figure.axes[0].texts if "error: " in text.get_text()]
    assert len(places) == 4
    for place, other in itertools.combinations(places, 2):
        assert place.x1 <= other.x0 or other.x1 <= place.x0
