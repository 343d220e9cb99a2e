"""The checks of notebook 05 accept the printed solutions and refuse what a reader is likely to get wrong."""

from types import SimpleNamespace

import helpers
import pytest
from checks import exercises_05


@pytest.fixture
def solved() -> dict:
    training = SimpleNamespace(gradient_accumulation_steps=2, batch_size=8)
    trainer = SimpleNamespace(config=SimpleNamespace(training=training, model=SimpleNamespace(max_seq_len=64)))
    return helpers.solved("05", trainer=trainer, summary={"steps": 40})


def test_the_solutions_pass(solved) -> None:
    assert exercises_05.check_first_below(solved["first_below"])
    assert exercises_05.check_tokens(solved["tokens"], 8, 2, 64, 40)
    assert exercises_05.check_verdict(solved["verdict"])


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda evals, floor: evals[-1][0], "step 200 is first"),
        (lambda evals, floor: next((s for s, loss in evals if loss <= floor), None), "equal to the floor"),
        (lambda evals, floor: next(s for s, loss in evals if loss < floor), "StopIteration"),
        (None, "not started"),
    ],
)
def test_first_below_refuses(wrong, hint, capsys) -> None:
    assert not exercises_05.check_first_below(wrong)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(("wrong", "hint"), [(40 * 8 * 64, "a step is an update"), (1, "tokens ="), (2.5, "whole")])
def test_tokens_refuses(wrong, hint, capsys) -> None:
    assert not exercises_05.check_tokens(wrong, 8, 2, 64, 40)
    assert hint in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda loss, floors: "trigram", "4.4 is below the bigram"),
        (lambda loss, floors: next((n for n in floors if loss < floors[n]), "nothing"), "the best table reached"),
        (lambda loss, floors: min((n for n in floors if loss < floors[n]), key=floors.get), "ValueError"),
    ],
)
def test_verdict_refuses(wrong, hint, capsys) -> None:
    assert not exercises_05.check_verdict(wrong)
    assert hint in capsys.readouterr().out
