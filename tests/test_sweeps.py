"""Figures of learning rates: they draw what they are given, and say its numbers."""

import math
from io import BytesIO

import numpy as np
import pytest
from checks import figures_04, figures_04a
from PIL import Image

from benchmarks.docs_table import filled, generated_pages
from moe_lab.failures.experiments import load_results
from moe_lab.show.style import png

SWEEP = {
    1e-4: [6.0, 6.1, 5.9],
    3e-4: [5.8, 5.7, 5.9],
    1e-3: [5.5, 5.6, 5.4],
    1e-2: [4.71, 4.70, 4.72],
    1e-1: [5.0, 5.1, 5.2],
}
FLOORS = {"trigram": 3.9, "bigram": 4.4, "unigram": 5.2}


@pytest.mark.parametrize("n_panels", [1, 2])
def test_a_sweep_shows_every_run_its_band_and_its_best(n_panels) -> None:
    panels = {f"width {96 * (i + 1)}": {"one": SWEEP, "other": SWEEP} for i in range(n_panels)}
    figure, description, _ = figures_04.lr_sweep(panels, FLOORS)
    assert Image.open(BytesIO(png(figure))).size == (1600, 672)
    assert len(figure.axes) == n_panels
    dots = [y for line in figure.axes[0].get_lines() for y in line.get_ydata() if line.get_linestyle() == "None"]
    assert sorted(dots) == sorted(2 * [loss for losses in SWEEP.values() for loss in losses])
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 4.70
    assert band[:, 1].max() == 6.1
    assert description.count("best 4.710 at 0.01") == 2 * n_panels
    words = [text.get_text() for text in figure.axes[0].texts]
    assert "unigram 5.20" in words and "bigram 4.40" in words
    assert not any("trigram" in word for word in words)  # far below every run


def test_a_diverged_seed_takes_its_setting_out_of_the_line() -> None:
    figure, description, _ = figures_04.lr_sweep({"width 96": {"one": {**SWEEP, 1.0: [4.0, math.inf, 4.1]}}})
    means = next(line for line in figure.axes[0].get_lines() if line.get_linestyle() != "None")
    assert np.isnan(means.get_ydata()[-1])
    assert "best 4.710 at 0.01" in description


def test_a_few_rates_are_named_and_looked_at_closely() -> None:
    near = {0.012: [5.36, 5.37], 0.024: [5.34, 5.35]}
    far = {lr: [loss - 0.7 for loss in losses] for lr, losses in near.items()}
    figure, _, caption = figures_04.lr_sweep({"200 updates": {"cosine": near}, "800 updates": {"cosine": far}})
    assert [axes.get_ylim() for axes in figure.axes] == [pytest.approx((5.32, 5.39)), pytest.approx((4.62, 4.69))]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0.012", "0.024"]
    assert "Star" not in caption


def bowl(x):
    return 4.6 + (x[:, 0] + 2) ** 2 + (x[:, 1] + 2) ** 2


def test_a_surface_shows_points_marks_and_intervals() -> None:
    points = {(10.0**a, 10.0**b): bowl(np.array([[a, b]]))[0] for a in (-3, -2, -1) for b in (-3, -2, -1)}
    marks = {"failure": (3e-4, 9e-5, 6.76)}
    surface = figures_04a.Surface(points, bowl, (1e-2, 1e-2), ((5e-3, 2e-2), (4e-3, 3e-2)), marks)
    figure, description, _ = figures_04a.lr_surface({"width 96": surface, "width 192": surface})
    assert Image.open(BytesIO(png(figure))).size == (1600, 784)
    for axes in figure.axes:
        words = [text.get_text() for text in axes.texts]
        assert "failure 6.76" in words
        assert "4.60" in words
        (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
        assert low_x < 3e-4 < 1e-1 < high_x
        assert low_y < 9e-5 < 1e-1 < high_y
        drawn = [tuple(line.get_xdata()) for line in axes.get_lines()]
        assert (5e-3, 2e-2) in drawn
    assert "width 192: fitted optimum at Muon 0.01 (0.005 to 0.02) and AdamW 0.01 (0.004 to 0.03)" in description
    assert "failure 6.76 at 0.0003 and 9e-05" in description


def test_the_generated_pages_are_those_of_the_rules_and_the_committed_runs() -> None:
    pages = generated_pages()
    assert len(pages) == 7
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run: make docs-table"


def test_what_stands_between_marks_is_replaced_and_nothing_else() -> None:
    page = "by hand\n<!-- a -->\nold\n<!-- /a -->\nby hand too\n"
    assert filled(page, "a", ["new", "lines"]) == "by hand\n<!-- a -->\nnew\nlines\n<!-- /a -->\nby hand too\n"
    with pytest.raises(ValueError, match="the marks <!-- b --> and <!-- /b --> are not there"):
        filled(page, "b", [])


def test_the_other_convention_gives_back_half_or_less_in_the_disputed_rows() -> None:
    """The mean, as docs/health.md says; and no seed much more."""
    found = load_results("disputed")
    rows = [arm for arm in found.arms() if "repaired" not in arm]
    assert len(rows) == 2
    for name in rows:
        assert len(found.seeds(name)) == 2
        for seed in found.seeds(name):
            sick = found.loss(name, seed)
            gains = [sick - found.loss(f"{name}, {what} repaired", seed) for what in ("convention", "LR")]
            assert 0 < gains[0] < 0.6 * gains[1]
        means = [found.paired(name, f"{name}, {what} repaired").mean for what in ("convention", "LR")]
        assert means[0] <= 0.5 * means[1]
