"""What notebooks 03 and 03a run on: their runs, figures, questions and verdicts, and the exercises that train."""

from types import SimpleNamespace

import pytest
import torch
from checks import exercises_03, exercises_03a, figures_03, figures_03a, questions_03, questions_03a
from checks import verdicts_03 as v03
from checks import verdicts_03a as v03a
from checks.designs import CENTRE, with_lrs
from checks.runs_bf16 import Run, of_group
from helpers import solved

from moe_lab import Trainer, load_config
from moe_lab.config import ROOT, Config
from moe_lab.failures import bugs


def small(muon: float = 1e-3, adamw: float = 3e-4, seed: int = 0, parameters: str = "float32", **training) -> Config:
    """The case's learning rates on a model that trains in a moment."""
    config = load_config(ROOT / "configs" / "smoke.yaml")
    training = {"warmup_steps": 0, "min_lr_ratio": 1.0, "steps": 50, "seed": seed} | training
    training |= {"batch_size": 1, "gradient_accumulation_steps": 1}
    config = config.with_(model={"max_seq_len": 32}, training=training, precision={"compute": "bfloat16"})
    return with_lrs(config, muon, adamw, parameters=parameters)


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    config = small()
    sick = Run(config, bug=bugs.cast_parameters)
    return {
        "float32": Run(config).train(25),
        "bf16": sick.train(25),
        "masters": Run(config, remedy="masters").train(25),
    }


# ---- runs


def test_a_run_is_the_trainers_own_and_keeps_what_it_did(runs, tmp_path) -> None:
    trainer = Trainer(small(), tmp_path / "run")
    losses = [report.losses["next_token"].item() for report in trainer.steps(until=25)]
    run = runs["float32"]
    for (name, p), q in zip(trainer.model.named_parameters(), run.trainer.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert [row["loss"] for row in run.rows] == pytest.approx([loss * 1.5 for loss in losses])  # weights 1.0 and 0.5
    assert len(run.norms) == 26 and torch.equal(run.norms[0], torch.ones_like(run.norms[0]))
    assert torch.equal(run.norms[-1], of_group(run.weights(), "norms"))
    assert run.furthest() > 0 == runs["bf16"].furthest()


def test_bytes_of_a_parameter(runs) -> None:
    """Weight and gradient, one momentum under Muon and two under AdamW, and what a remedy adds."""
    sizes = {name: run.bytes_per_parameter() for name, run in runs.items()}
    assert 12 < sizes["float32"] < 16  # 4 + 4 + 4 to 8
    assert sizes["bf16"] == pytest.approx(sizes["float32"] / 2, rel=0.01)
    assert sizes["masters"] == pytest.approx(sizes["float32"], rel=0.01)


# ---- figures


def test_a_figure_of_two_runs_says_their_numbers_and_no_finding(runs) -> None:
    pair = {name: runs[name] for name in ("float32", "bf16")}
    figure, alt, caption = figures_03.pair_figure(pair)
    assert "furthest norm weight 0.0000 from 1" in alt and "lost_updates" not in alt + caption
    curves = [line.get_ydata() for line in figure.axes[1].get_lines()]
    assert list(curves[1]) == [0.0] * 25 and curves[0][-1] == runs["float32"].furthest()
    assert "lost_updates" in {finding.rule for finding in runs["bf16"].watch.findings}


@pytest.mark.parametrize(("lr", "way"), [(3e-4, 0.0), (2.5e-3, 0.0), (2.5e-3, 1.0), (5e-3, 1.0)])
def test_a_weight_under_updates_goes_where_rounding_lets_it(lr: float, way: float) -> None:
    ends = {name: path[-1] for name, path in figures_03.under_updates(lr, way).items()}
    far = 100 * lr * (1 if way else -1)
    assert ends["float32"] == pytest.approx(1 + far, abs=1e-4)
    assert (ends["bf16"] == 1) == (lr <= (2**-8 if way else 2**-9))
    assert ends["Kahan"] == pytest.approx(1 + far, abs=2**-7)  # within a gap
    assert ends["stochastic"] == pytest.approx(1 + far, abs=0.06)
    _, alt, _ = figures_03.weight_under_updates(lr, way)
    assert f"bf16 {ends['bf16']:.4f}" in alt


def test_figures_tell_their_numbers() -> None:
    figure, alt, caption = figures_03a.arrived_bars({"norms": 0.0, "matrices": 0.84, "heads": 0.99})
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["norms", "matrices", "heads"]
    assert "matrices 0.84" in alt and "50 %" in caption
    figure, alt, _ = figures_03a.cost_dots({"bf16": (0.057, 0.001), "norms_at_0.1": (1.2, 0.005)})
    assert figure.axes[0].get_xscale() == "symlog" and "bf16, no remedy +0.057 ± 0.001" in alt
    _, alt, _ = figures_03a.cost_over_width({96: (0.057, 0.001), 1536: (0.197, float("nan"))})
    assert "0.057 at 96 ± 0.001" in alt and "0.197 at 1536 (one seed)" in alt
    _, alt, _ = figures_03a.given_back({"norms": (0.007, 0.003)}, (0.018, 0.004))
    assert "norms in float32 0.0070 ± 0.0030" in alt
    _, alt, _ = figures_03a.freezing([0.5, 0.9, 0.0], [1e-2, 5e-3, 1e-3])
    assert "up to 90%" in alt and "is update 2 of 3" in alt
    _, alt, _ = figures_03.ulp_histogram({"norms": torch.tensor([0.1, 0.2, 0.7, 3.0])})
    assert "norms 50%" in alt


# ---- questions and verdicts


@pytest.mark.parametrize(
    ("question", "measured", "answer"),
    [
        (questions_03.curve, {"start": 7.6, "control": 7.3, "sick": 7.31}, "hardly be told apart"),
        (questions_03.curve, {"start": 7.6, "control": 7.3, "sick": 7.59}, "does not fall"),
        (questions_03.curve, {"start": 7.6, "control": 7.3, "sick": 7.5}, "half the pace"),
        (questions_03.cause, {"with_gradient": 4, "looks": 5, "intended": 1, "control": 1, "moved": 0}, "no gradient"),
        (questions_03.cause, {"with_gradient": 5, "looks": 5, "intended": 0, "control": 1, "moved": 0}, "by nothing"),
        (questions_03.cause, {"with_gradient": 5, "looks": 5, "intended": 1, "control": 1, "moved": 0}, "rounded"),
        (questions_03.lr, {"least_lr": 1.7e-3}, "2e-3"),
        (questions_03.between, {"rose": 0, "fell": 1}, "down fall"),
        (questions_03.ratio, {"norms": 1.0, "vectors": 0.9, "matrices": 0.3}, "most of Mamba's"),
        (questions_03.ratio, {"norms": 1.0, "vectors": 0.4, "matrices": 0.3}, "norms alone"),
        (questions_03a.most, {"failure": 0.21, "cure": 0.06, "centre": 0.0}, "failing"),
        (questions_03a.most, {"failure": 0.0, "cure": 0.0, "centre": 0.0}, "nowhere"),
        (questions_03a.kinds, {"matrices": 0, "vectors": 2, "tables": 0}, "Mamba"),
        (questions_03a.width, {"ratio": 0.62}, "a third"),
        (questions_03a.fresh, {"over": 1.0}, "nearly all"),
        (questions_03a.late, {"moved": 0.9, "frozen_from": 48, "n_updates": 60}, "last quarter"),
        (questions_03a.late, {"moved": 0.9, "frozen_from": 61, "n_updates": 60}, "to the end"),
        (questions_03a.norms_only, {"back": 0.56}, "about half"),
        (questions_03a.norms_only, {"back": 0.02}, "less than a fifth"),
    ],
)
def test_what_was_measured_decides_the_answer(question, measured: dict, answer: str) -> None:
    assert answer in question.answer(measured)


def test_verdicts_follow_from_the_numbers() -> None:
    def outcomes(judge, *rows: dict) -> list[str]:
        return [judge(**row)[0] for row in rows]

    run = {"bf16": 0.0, "float32": 0.007, "updates": 25, "largest_step": 3.5e-4, "half_gap": 2**-9}
    rows = run, run | {"bf16": 0.01}, run | {"float32": 0.0}, run | {"largest_step": 3e-3}
    assert outcomes(v03.C01, *rows) == ["holds", "does not hold", "open", "open"]
    ends = {"down": 2**-9, "up": 2**-8, "whole": True, "median_step": 1.6e-4}
    rows = ends, ends | {"down": 1e-6, "up": 1e-6}, ends | {"whole": False}
    assert outcomes(v03.C02, *rows) == ["holds", "does not hold", "holds only if"]
    moved = {"still_in_control": 0, "still_in_sick": 11, "together": 0.97, "updates": 25}
    rows = moved, moved | {"together": 0.2}, moved | {"still_in_control": 1}, moved | {"still_in_sick": 0}
    assert outcomes(v03.C16, *rows) == ["holds only if", "holds", "does not hold", "open"]
    only = {"norms": 0.0, "others": 2, "matrix_at_1536": 0.58}
    rows = (
        only,
        only | {"matrix_at_1536": 0.99},
        {"norms": 0.0, "others": 0, "matrix_at_1536": 0.99},
        only | {"norms": 1.0},
    )
    assert outcomes(v03a.C03, *rows) == ["does not hold", "holds only if", "holds", "open"]
    cured = {"recovered": True, "share": 0.11, "widths": [96, 192], "at_1536": 0.2}
    assert outcomes(v03a.C04, cured, cured | {"share": 0.7}, cured | {"recovered": False}) == [
        *("holds only if", "holds", "open")
    ]
    assert "96 and 192" in v03a.C04(**cured)[1] and "11%" in v03a.C04(**cured)[1]


# ---- exercises that train


@pytest.mark.parametrize("seed", [0, 1])
def test_the_patients_show_their_causes_to_a_watch(seed: int, capsys) -> None:
    config = small(seed=seed)
    right = {letter: solved("03")["diagnose"](t) for letter, t in exercises_03.patients(config).items()}
    assert sorted(right.values()) == sorted(exercises_03.CAUSES)
    assert exercises_03.check_causes(right, config)
    for letter, cause in right.items():
        other = next(word for word in exercises_03.CAUSES if word != cause)
        assert not exercises_03.check_causes(right | {letter: other}, config)
        assert f"{letter} is not {other!r}: {exercises_03.REFUTED[other]}" in capsys.readouterr().out
    assert not exercises_03.check_causes({"A": "healthy"}, config)


def test_letters_follow_the_seed() -> None:
    orders = {tuple(exercises_03.shuffled_causes(small(seed=seed)).values()) for seed in range(6)}
    assert len(orders) > 2
    assert len({tuple(exercises_03a.shuffled_states(seed).values()) for seed in range(6)}) > 2


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [([], "norm tensors still stand"), (["training.max_lr=0.03"], "learning rates"), ("x", "must be a list")],
)
def test_the_sick_config_is_mended_by_its_parameters_alone(overrides, hint: str, capsys) -> None:
    assert not exercises_03.check_overrides(overrides, small())
    assert hint in capsys.readouterr().out


def test_the_solutions_of_the_configs_pass() -> None:
    assert exercises_03.check_overrides(solved("03")["overrides"], small())
    falling = small(*CENTRE, parameters="bfloat16", min_lr_ratio=0.0)
    assert exercises_03a.check_overrides(solved("03a")["overrides"], falling)


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ([], "no norm weight moves"),
        (["precision.parameters=float32"], "cures it"),
        (["training.max_lr=0.1"], "the peak"),
    ],
)
def test_the_schedule_is_mended_by_its_end_alone(overrides: list, hint: str, capsys) -> None:
    falling = small(*CENTRE, parameters="bfloat16", min_lr_ratio=0.0)
    assert not exercises_03a.check_overrides(overrides, falling)
    assert hint in capsys.readouterr().out


def test_checkpoints_are_told_apart_by_inspection(runs, capsys) -> None:
    files = exercises_03a.checkpoints(runs, seed=3)
    right = {letter: solved("03a")["state_of"](path) for letter, path in files.items()}
    assert sorted(right.values()) == sorted(exercises_03a.STATES.values())
    assert exercises_03a.check_states(right, 3)
    for letter, state in right.items():
        other = next(word for word in exercises_03a.STATES.values() if word != state)
        assert not exercises_03a.check_states(right | {letter: other}, 3)
        assert exercises_03a.REFUTED[other] in capsys.readouterr().out


def test_side_by_side_trains_each_to_the_end_and_draws_once(monkeypatch) -> None:
    from checks import runs_bf16

    shown = []
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "0")
    monkeypatch.setattr(runs_bf16, "show", lambda *drawn: shown.append(drawn))
    pair = {"float32": Run(small()), "bf16": Run(small(), bug=bugs.cast_parameters)}
    runs_bf16.train_side_by_side(pair, 3)
    assert [len(run.rows) for run in pair.values()] == [3, 3] and len(shown) == 1


def test_side_by_side_redraws_one_figure_where_somebody_watches(monkeypatch) -> None:
    from checks import runs_bf16

    pictures = []
    monkeypatch.setenv("MOE_LAB_INTERACTIVE", "1")
    handle = SimpleNamespace(update=lambda picture, raw: pictures.append(picture))
    monkeypatch.setattr(runs_bf16, "display", lambda picture, **_: pictures.append(picture) or handle)
    times = iter(range(0, 1000, 2))
    monkeypatch.setattr(runs_bf16.time, "monotonic", lambda: next(times))
    runs_bf16.train_side_by_side({"float32": Run(small())}, 3)
    assert len(pictures) == 4  # after each update, and at the end
    assert "After 1 updates" in pictures[0]["text/html"] and "After 3 updates" in pictures[-1]["text/html"]
