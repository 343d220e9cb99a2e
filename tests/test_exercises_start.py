"""The checks of the exercises of notebooks 00 and 01 accept the printed solutions and refuse likely mistakes."""

import math
from types import SimpleNamespace

import IPython.display
import numpy as np
import pytest
from checks import exercises_00, exercises_01, explore_01, figures_00, figures_01, measure_01
from helpers import solved
from test_explorables import Page

from moe_lab.config import ROOT, load_config
from moe_lab.data import loss_floors, prepare
from moe_lab.data.ngrams import witten_bell
from moe_lab.failures.results import Results, load_results

SMOKE = load_config(ROOT / "configs" / "smoke.yaml")
DIAGNOSES = {"A": "frequencies only", "B": "another number", "C": "random tokens", "D": "beats the tables"}
V = 300


@pytest.fixture(scope="module")
def dataset() -> SimpleNamespace:
    """Tokens with the frequencies of text, of which each follows from the one before, up to a little noise."""
    rng = np.random.default_rng(0)
    ranks = 1 / np.arange(1, V + 1)
    free = rng.choice(V, size=60_000, p=ranks / ranks.sum()).astype(np.uint32)
    tokens = free.copy()
    for place in range(1, len(tokens)):
        if place % 3:
            tokens[place] = free[tokens[place - 1]]  # a fixed follower
    return SimpleNamespace(train=tokens, validation=tokens[:9000], vocab_size=V)


NAMED = {"bf16_parameters": 53, "muon_convention": 36, "lr_too_low": 36}
ONE_HEAD = ["model.n_pred_tokens=1", "model.aux_loss_weights=[1.0]"]
# of each check: wrong answers, and what the reader is told
WRONG_00 = {
    "named": [
        ({"bf16_parameters": None}, "nothing is written"),
        (NAMED | {"rate_too_low": 36}, "no rule is called 'rate_too_low'"),
        ({"bf16_parameters": 53, "muon_convention": 36}, "2 of 3"),
        ({"bf16_parameters": 53}, "two causes"),
        (NAMED | {"bf16_parameters": 1}, "after the colon"),
        ({"lr_too_low": 36, "never_moved": 53}, "number format"),
        ({"bf16_parameters": 53, "unread_key": 36}, "about a learning rate"),
        (NAMED | {"lr_too_low": 12}, "stands in line 36"),
        (NAMED | {"weight_decay_on_norms": 51}, "neither an error nor a warning"),
    ],
    "overrides": [
        ([*ONE_HEAD, "training.steps=1"], "number of steps"),
        ("model.n_pred_tokens=1", "a list of texts"),
        (["model.n_heads=4"], "future_2"),
        (["model.n_pred_tokens=1"], "ConfigError"),
        ([*ONE_HEAD, "model.init_std=0.3"], "change the heads alone"),
    ],
    "next_token_loss": [
        (lambda row, weights: row["losses"]["next_token"] / weights[0], "undo the weight"),
        (lambda row, weights: sum(row["losses"].values()), "leave the routers' terms out"),
        (lambda row, weights: row["losses"]["next_token"] * sum(weights), "the same shares"),
        (lambda row, weights: row["losses"]["next_token"] * len(weights), "divide by that"),
    ],
}
WRONG_01 = {
    "step_0_loss": [
        (lambda v, d, s: math.log(v), "whatever init_std is"),
        (lambda v, d, s: math.log2(v) + d * s**2 / 2, "natural log"),
        (lambda v, d, s: math.log(v) + d * s**2, "the whole variance"),
        (lambda v, d, s: math.log(v) + d * s / 2, "init_std**2"),
    ],
    "override": [
        (["model.init_std=0.25"], "one text"),
        ("model.init_std=0.02", "does not change"),
        ("model.d_model=64", "shapes"),
        ("training.max_lr=1.0", "does not change"),
        ("model.init_sdt=0.25", "init_std"),
        ("model.init_std=0.2", "too near"),
        ("model.init_std=0.4", "too far"),
    ],
    "diagnosis": [
        (DIAGNOSES | {"C": "frequencies only", "A": "random tokens"}, "C: which loss"),
        (DIAGNOSES | {"A": "beats the tables"}, "A: beside which table"),
        (DIAGNOSES | {"B": "beats the tables"}, "B: look at its start"),
        (DIAGNOSES | {"D": "another number"}, "D: its start is right"),
        (DIAGNOSES | {"B": "Beats the tables!"}, "use these words"),
        ({"A": "frequencies only"}, "name all four"),
    ],
}


def accepts(number: str, name: str, answer: object, dataset) -> bool:
    check = getattr({"00": exercises_00, "01": exercises_01}[number], f"check_{name}")
    given = {"override": (SMOKE, dataset), "suspects": (dataset, 0)}.get(name, ())
    return check(answer, *given)


def answers_of(number: str, dataset, seed: int = 0) -> dict:
    """What the printed solutions define, with the notebook's names at hand."""
    suspects = exercises_01.suspects(dataset, seed)
    names = {"lab": SimpleNamespace(config=SMOKE), "dataset": dataset, "V": V, "suspects": suspects}
    names |= {"witten_bell": witten_bell, "collisions": lambda tokens: measure_01.collisions(tokens, V)}
    return solved(number, **names)


@pytest.mark.parametrize(("number", "name"), [("00", name) for name in WRONG_00] + [("01", name) for name in WRONG_01])
def test_the_solutions_pass(number, name, dataset) -> None:
    assert accepts(number, name, answers_of(number, dataset)[name], dataset)


WRONG = [("00", name, *row) for name, rows in WRONG_00.items() for row in rows]
WRONG += [("01", name, *row) for name, rows in WRONG_01.items() for row in rows]


@pytest.mark.parametrize(("number", "name", "wrong", "hint"), WRONG)
def test_what_a_reader_is_likely_to_get_wrong_is_refused(number, name, wrong, hint, dataset, capsys) -> None:
    assert not accepts(number, name, wrong, dataset)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(4))
def test_the_four_batches_are_told_apart_and_mistakes_are_not(seed, dataset, capsys) -> None:
    right = answers_of("01", dataset, seed)["named"]
    assert exercises_01.check_suspects(right, dataset, seed)
    of = {kind: letter for letter, kind in right.items()}
    for one, other, hint in (
        ("text", "shuffled text", "do not belong together"),
        ("text", "padding", "one token"),
        ("random tokens", "padding", "near 1"),
    ):
        capsys.readouterr()
        assert not exercises_01.check_suspects(right | {of[one]: other, of[other]: one}, dataset, seed)
        assert hint in capsys.readouterr().out
    assert not exercises_01.check_suspects({"A": "text"}, dataset, seed)
    assert "name all four" in capsys.readouterr().out


def test_the_letters_do_not_give_the_batches_away(dataset) -> None:
    orders = {tuple(kind for kind, _ in exercises_01.dealt(dataset, seed).values()) for seed in range(6)}
    assert len(orders) > 1


@pytest.mark.parametrize(  # of profiles smoke and lab, rounded
    "floors",
    [
        {"uniform": 6.24, "unigram": 5.34, "bigram": 3.59, "trigram": 2.85},
        {"uniform": 8.32, "unigram": 6.65, "bigram": 4.74, "trigram": 4.44},
    ],
)
def test_each_mystery_run_shows_what_its_diagnosis_says(floors: dict) -> None:
    step_0 = floors["uniform"] + 0.04
    runs = exercises_01.mystery_runs(floors, step_0)
    told = {"random tokens": "uniform", "frequencies only": "unigram"}
    for letter, diagnosis in DIAGNOSES.items():
        start, end = runs[letter]
        assert (start == step_0) == (diagnosis != "another number")
        if diagnosis in told:  # beside its table, and not beside another
            assert min(floors, key=lambda name: abs(floors[name] - end)) == told[diagnosis]
        else:  # both look good at the end; the start tells them apart
            assert end < min(floors.values())


# ---- what notebook 01 measures ---------------------------------------------------------------------------------------


def test_collisions_are_those_of_a_loop_over_pairs() -> None:
    tokens = np.random.default_rng(1).integers(7, size=40)
    pairs = [(a, b) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
    by_hand = 7 * sum(a == b for a, b in pairs) / len(pairs)
    assert measure_01.collisions(tokens.reshape(8, 5), 7) == pytest.approx(by_hand)
    assert measure_01.collisions(np.arange(7), 7) == 0
    assert measure_01.collisions(np.zeros(9, dtype=int), 7) == 7


def test_even_draws_collide_once_and_text_more(dataset) -> None:
    noise = np.random.default_rng(2).integers(V, size=4000)
    assert measure_01.collisions(noise, V) == pytest.approx(1, abs=0.1)
    assert measure_01.collisions(dataset.train[:4000], V) > 3


def test_a_crossing_is_the_first_reading_below_of_the_mean_over_seeds() -> None:
    rows = [{"arm": "a", "seed": s, "training": {"1": 7.0 + s, "11": 6.0 - s, "21": 5.0}} for s in (0, 1)]
    rows += [{"arm": "b", "seed": 0, "training": {"1": 7.0, "11": 6.9}}]
    assert measure_01.crossings(Results("x", rows), 5.9) == {"a": 11, "b": None}
    assert measure_01.crossings(Results("x", rows), 5.1) == {"a": 21, "b": None}


@pytest.mark.parametrize(
    ("losses", "kind"),
    [
        ((7.0, 5.0, 50257, 0.31), "another number"),
        ((11.13, 10.83, 50257, 0.31), "nothing learned"),
        ((11.13, 10.70, 50257, 0.31), "below ln V"),
        ((11.13, 12.0, 50257, 0.31), "it rises"),
        ((math.log(64), 0.1, 64, 0.0), "below ln V"),
        ((4 * math.log(64), 0.1, 64, 0.0), "another number"),
    ],
)
def test_two_losses_are_read_start_first(losses, kind) -> None:
    verdict = explore_01.loss_verdict(*losses)
    assert verdict.kind == kind
    assert verdict.sentence in explore_01.one_line(losses[0], losses[1], math.log(losses[2]), losses[3])[1]


def test_the_start_is_where_the_formula_says_whatever_is_moved() -> None:
    for vocab_size, width, std in ((2048, 192, 0.02), (50257, 1536, 0.02), (64, 32, 0.1)):
        _, alt, _ = explore_01.start_figure(vocab_size, width, std)
        assert f"starts at {math.log(vocab_size) + width * std**2 / 2:.2f} nats" in alt


def test_figures_say_what_they_draw() -> None:
    floors = figures_00.floors_of("lab")
    _, alt, caption = figures_00.case_curves(load_results("reproduction"), floors)
    assert "from 7.67 to 6.41" in alt and "three seeds" in caption
    figure, alt, _ = figures_01.floor_steps(floors, {"untrained model": 7.665})
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {"−1.21", "−1.99", "−0.43"} <= set(words) and "bigram 4.42" in alt
    assert "no update yet" in figures_01.two_curves({"A": [], "B": []}, {"ln V": 7.6}, "two", 10)[1]
    assert "A from 7.00 to 7.00" in figures_01.two_curves({"A": [7.0] * 12, "B": [6.0]}, {}, "two")[1]


def test_the_committed_floors_are_those_of_this_corpus() -> None:
    config = load_config(ROOT / "configs" / "lab.yaml")
    counted = prepare(config.data, config.model)
    stored = figures_00.read_floors()["lab"]
    if counted.corpus_hash != stored["corpus"]:
        pytest.skip("another Python's library is another corpus")
    assert loss_floors(counted) == pytest.approx(stored["floors"], rel=1e-9)
    assert counted.vocab_size == stored["vocab_size"]


@pytest.mark.parametrize("watched", [False, True], ids=["headless", "watched"])
def test_two_runs_are_trained_in_turn_and_drawn_as_they_go(watched, monkeypatch) -> None:
    shown, redrawn = [], []

    class Handle:
        def update(self, picture, raw) -> None:
            redrawn.append(picture["text/plain"])

    def display(picture, **options) -> Handle:
        shown.append(picture["text/plain"])
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(measure_01, "is_interactive", lambda: watched)
    monkeypatch.setattr(measure_01, "REDRAW_S", 0.0)
    text = prepare(SMOKE.data, SMOKE.model).train
    noise = np.random.default_rng(0).integers(512, size=20_000, dtype=np.uint32)
    runs = measure_01.shuffled("AB", measure_01.Sick((3e-4, 9e-5), text), measure_01.Sick((3e-3, 9e-4), noise), 0)
    draw = measure_01.drawing("two", {"ln V": math.log(512)}, 3)
    losses = measure_01.train_side_by_side(SMOKE, runs, 3, draw)
    assert list(losses) == ["A", "B"] and all(len(several) == 3 for several in losses.values())
    start = math.log(512) + measure_01.HALF_VARIANCE
    assert all(abs(several[0] - start) < 0.25 for several in losses.values())
    assert losses["A"] != losses["B"]
    assert ("no update yet" in shown[0]) == watched and len(redrawn) == (4 if watched else 0)


def test_the_boxes_of_notebook_01_follow_their_sliders(monkeypatch) -> None:
    page = Page(monkeypatch, live="1")
    explore_01.explore_losses()
    first, last, log_v, half = page.shown[0].children
    assert "should be 11.10" in page.shown[-1]["text/plain"]
    first.value = 11.0
    assert "5.80 below ln V" in page.pictures[-1]
    last.value = 10.8
    assert "Look at the tokens" in page.pictures[-1]
    page = Page(monkeypatch, live="1")
    explore_01.explore_start(2048, 192, 0.02)
    vocabulary, width, _std = page.shown[0].children
    assert "starts at 7.66 nats" in page.shown[-1]["text/plain"]
    width.value = 1536
    assert "starts at 7.93 nats" in page.pictures[-1]
    vocabulary.value = 2**16
    assert f"starts at {math.log(2**16) + 0.3072:.2f} nats" in page.pictures[-1]


def test_headless_the_boxes_stand_still_and_answer_nothing_that_is_asked_later(monkeypatch) -> None:
    page = Page(monkeypatch, live="0")
    explore_01.explore_losses()
    explore_01.explore_start(2048, 192, 0.02)
    assert len(page.shown) == 2
    assert not any(
        word in picture["text/plain"] for picture in page.shown for word in ("random", "collision", "bigram")
    )
