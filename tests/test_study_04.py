"""What notebooks 04 and 04a read out of committed runs, against numbers made for the purpose; their figures say their numbers."""

import numpy as np
import pytest
import torch
from checks import figures_04, figures_04a, questions_04, questions_04a, study_04, verdicts_04a
from checks.figures_04 import Best

from moe_lab.course.lessons import Question
from moe_lab.failures.results import Results, load_results
from moe_lab.optim.muon import orthogonalise


def row(arm: str, seed: int, loss: float) -> dict:
    return {"arm": arm, "seed": seed, "steps": 200, "validation": {"200": loss}, "training": {"1": 7.0, "11": loss}}


def test_a_run_crosses_where_the_mean_of_its_readings_does() -> None:
    falling = {n: 7.0 - n / 100 for n in range(1, 200, 10)}
    at = study_04.crossing(falling, 6.005, window=1)
    assert at == 101 and falling[at] < 6.005 < falling[at - 10]
    assert study_04.crossing(falling, 6.005, window=5) == 81  # the mean of 81 … 121 is that of 101
    assert study_04.crossing(falling, 1.0) is None
    spike = falling | {11: 0.0}  # one batch is no crossing
    assert study_04.crossing(spike, 5.0, window=5) not in (1, 11)


def test_losses_stand_under_their_schedule_and_rate() -> None:
    rows = [
        row(f"{kind} {lr:g}", seed, lr + seed)
        for kind in ("constant", "cosine")
        for lr in (1e-3, 4e-3)
        for seed in (0, 1)
    ]
    found = study_04.by_schedule(Results("x", rows))
    assert found == dict.fromkeys(("constant", "cosine"), {1e-3: [0.001, 1.001], 4e-3: [0.004, 1.004]})


def test_an_exponent_is_a_slope_of_logs() -> None:
    assert study_04.exponent({n: Best(3 * n**-0.32, 0, 0) for n in (200, 800, 3200)}) == pytest.approx(-0.32)


def test_a_corner_is_an_arm_of_the_design() -> None:
    found = load_results("attribution_96")
    arms = {study_04.corner(point, fixed) for point in ("cure", "centre") for fixed in study_04.SUBSETS}
    assert arms <= set(found.arms()) and len(arms) == 14
    assert study_04.corner("cure", {"Muon"}) == "failure with Muon of cure, bf16"
    assert study_04.corner("cure", {"AdamW", "Muon", "float32"}) == "cure, float32"
    assert study_04.corner("cure", {"float32"}) == "failure, float32"


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_the_polynomial_is_what_newton_schulz_does_to_singular_values(steps: int) -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    scaled = torch.linalg.svdvals(matrix / matrix.norm()).numpy()
    done = torch.linalg.svdvals(orthogonalise(matrix, steps).float()).numpy()
    np.testing.assert_allclose(np.sort(figures_04.polynomial(scaled, steps)), np.sort(done), rtol=0.03, atol=0.01)


@pytest.mark.parametrize("convention", ["original", "match_rms_adamw"])
def test_the_translator_says_a_twin_that_moves_an_element_as_far(convention: str) -> None:
    _, alt, _ = figures_04.translate(0.01, convention, 64, 256)
    twin = {"original": 0.01 / 16 / 0.2, "match_rms_adamw": 0.01}
    other = "original" if convention != "original" else "match_rms_adamw"
    assert f"{convention}: RMS step {twin[convention] * 0.2:.2g}, like AdamW at {twin[convention]:.2g}" in alt
    assert f"The same number in {other}: RMS step {twin[other] * 0.2:.2g}" in alt


def test_figures_say_their_numbers() -> None:
    floors = {"uniform": 7.6, "unigram": 6.4, "bigram": 4.4, "trigram": 4.0}
    figure, alt, _ = figures_04a.curves({"here": {"sick": [{1: 7.5, 11: 6.9}, {1: 7.7, 11: 7.1}]}}, floors, "says")
    assert "here, sick: 7.60 at update 1, 7.00 at 11" in alt
    drawn = [list(line.get_ydata()) for line in figure.axes[0].get_lines()]
    assert [7.6, 7.0] in [[round(float(y), 9) for y in line] for line in drawn]
    _, alt, _ = figures_04a.share_bars({"cure": {"Muon": (0.1, 0.01), "AdamW": (0.6, 0.02)}})
    assert "cure: Muon 0.10 ± 0.01, AdamW 0.60 ± 0.02" in alt
    _, alt, _ = figures_04.step_sizes({"matrices": {1: 1.0, 40: 0.19}})
    assert "matrices 1.00 at update 1 and 0.19 at update 40" in alt
    _, alt, _ = figures_04.horizon({"AdamW": {200: Best(0.02, 0.01, 0.04), 800: Best(0.01, 0.005, 0.02)}})
    assert "0.02 (0.01 to 0.04) after 200" in alt
    _, alt, _ = figures_04.spectra({"before": [0.5, 0.1], "after": [1.1, 0.7]})
    assert "after from 1.1 down to 0.7" in alt


RANGES = {
    "adamw_over_muon": np.geomspace(0.1, 20, 60),
    "rms": np.linspace(0, 1.5, 60),
    "lr": np.geomspace(1e-4, 1, 60),
    "ratio": np.geomspace(0.05, 5, 60),
    "share": np.linspace(0, 1, 60),
    "collisions": [1.0, 2.9, 3.1, 17.0],
    "moved": [0.0, 0.49, 0.51, 1.0],
    "gradient": [0.5, 1.0],
    "crossed": [True, False],
    "last": [5.0, 6.31, 6.4, 7.0],
    "unigram": [6.41],
    "muon": [0.0, 0.08, 0.3, 0.6],
    "adamw": [0.0, 0.08, 0.3, 0.6],
    "healthy": [True, False],
    "sick": [True, False],
}
NEEDS = {
    "step": ["adamw_over_muon"],
    "adamw": ["rms"],
    "sweep": ["lr"],
    "horizon": ["ratio"],
    "settles": ["crossed", "last", "unigram"],
    "culprit": ["collisions", "moved", "gradient"],
    "corner": ["muon", "adamw"],
    "rule": ["healthy", "sick"],
    "reach": ["share"],
}


@pytest.mark.parametrize("name", NEEDS)
def test_of_a_questions_options_one_is_true_whatever_is_measured(name: str) -> None:
    found = [getattr(module, name, None) for module in (questions_04, questions_04a)]
    question = next(q for q in found if isinstance(q, Question))
    answers = set()
    grids = np.meshgrid(*(np.arange(len(RANGES[key])) for key in NEEDS[name]))
    for places in np.stack([grid.ravel() for grid in grids], axis=1):
        measured = {key: RANGES[key][place] for key, place in zip(NEEDS[name], places, strict=True)}
        answers.add(question.answer(measured))
    assert answers == set(question.options)  # and none is there that could never be


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds only if"),
        ({"crossings": [-1, -1]}, "holds"),
        ({"loss_at_125": 6.0}, "does not hold"),
        ({"last": 6.4}, "does not hold"),
    ],
)
def test_a_fall_above_the_unigram_table_is_no_learning_of_order(changes: dict, outcome: str) -> None:
    numbers = {"crossings": [301, 331], "fall_by_125": 0.5, "loss_at_125": 7.0, "unigram": 6.41, "last": 5.75}
    assert verdicts_04a.C08(**numbers | changes)[0] == outcome


def test_a_hundredth_of_a_nat_does_not_refute_a_range() -> None:
    above = {"0.0003": 0.018, "0.001": 0.013, "0.01": 0.0}
    assert verdicts_04a.C11(above, dict.fromkeys(above, 0.003))[0] == "open"
    assert verdicts_04a.C11(above | {"0.0003": 0.3, "0.001": 0.2}, {})[0] == "does not hold"
    assert verdicts_04a.C11(above | {"0.001": -0.1}, {})[0] == "holds"
