"""Checks of notebook 04's exercises. Solutions: notebooks/solutions/04.md."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch.optim import Optimizer

from checks.exercise import exercise
from moe_lab.health import preflight
from moe_lab.health.conventions import adamw_equivalent
from moe_lab.optim import Muon
from moe_lab.sections import read_yaml

# what each optimizer that calls itself Muon does to the plain orthogonal step of a matrix of A rows and B columns
MYSTERIES = {"A": "match_rms_adamw", "B": "plain", "C": "original"}


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def mystery(name: str) -> Callable[[Iterable[torch.Tensor], float], Optimizer]:
    """A function `make(parameters, lr)`, for one matrix."""
    kind = MYSTERIES[name]

    def make(parameters: Iterable[torch.Tensor], lr: float) -> Optimizer:
        (p,) = parameters
        if kind == "plain":  # the factor that `original` multiplies with is taken off the rate
            return Muon([p], lr=lr / math.sqrt(max(1.0, p.shape[0] / p.shape[1])))
        return Muon([p], lr=lr, adjust_lr=kind)

    return make


@exercise
def check_to_original(to_original: Callable) -> None:
    """`to_original(lr, rows, columns)`: the number in `original` of the step that `lr` names in `match_rms_adamw`."""
    square, factor = to_original(1e-3, 1536, 1536), 0.2 * math.sqrt(1536)
    assert not close(square, 1e-3), "the same number names two different steps, unless the matrix has a fan-in of 25"
    assert not close(square, 1e-3 / factor), (
        "you convert the other way round: in a wide matrix the number in `original` is the larger one"
    )
    assert close(square, 1e-3 * factor), "for 1536 × 1536 the factor is 0.2 · sqrt(1536), about 7.8"
    assert close(to_original(1e-3, 4096, 1536), 1e-3 * factor), (
        "a tall matrix (4096 rows, 1536 columns) has the factor of its columns, the fan-in: `original` has sqrt(rows / "
        "columns) in it already"
    )
    wide = to_original(1e-3, 1536, 4096)
    assert close(wide, 1e-3 * 0.2 * math.sqrt(4096)), "a wide matrix (1536 rows, 4096 columns) has a fan-in of 4096"
    assert close(to_original(2e-3, 100, 100), 4e-3), "it is proportional to lr"


@exercise
def check_conventions(answer: Mapping[str, str]) -> None:
    """`answer`: the convention of each mystery."""
    kinds = sorted(set(MYSTERIES.values()))
    assert set(answer) == set(MYSTERIES), f"answer with a dict of {', '.join(MYSTERIES)}"
    assert set(answer.values()) <= set(kinds), f"the words are {', '.join(map(repr, kinds))}"
    wrong = [name for name, kind in MYSTERIES.items() if answer[name] != kind]
    swapped = {answer[name] for name in wrong} == {"plain", "original"}
    assert not swapped, "two of them differ in tall matrices alone, with more rows than columns: measure one"
    assert not wrong, (
        f"{', '.join(wrong)}: measure the RMS of one step from zero, over the learning rate, in a tall matrix"
    )


@exercise
def check_config(text: str) -> None:
    """`text`: the YAML of a repaired config."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "repaired.yaml"
        path.write_text(text, encoding="utf-8")
        config, findings = read_yaml(path), preflight(path)
    assert config["model"]["d_model"] == 1536, "repair the rates, not the model"
    optimizer, training = config["optimizer"], config["training"]
    assert optimizer["type"] == "muon", "the optimizer stays Muon"
    muon = adamw_equivalent(training["max_lr"], (1536, 1536), optimizer.get("adjust_lr", "original"))
    adamw = training["max_lr"] * optimizer["adamw_lr_ratio"]
    assert muon > 1.5e-4, (
        f"Muon's step is like AdamW's at {muon:.1e}: still short; convert the number, or its convention"
    )
    assert muon < 6e-4, f"Muon's step is like AdamW's at {muon:.1e}: more than twice what was asked for"
    assert 5e-5 < adamw < 1e-3, (
        f"AdamW beside it now runs at {adamw:.1e}: its rate hangs on the same line, by adamw_lr_ratio; set that, too"
    )
    rules = [f.rule for f in findings if f.rule in ("muon_convention", "lr_too_low", "lr_too_high")]
    assert not rules, f"preflight still says {', '.join(rules)}"
