"""Checks of notebook 00's exercises. Solutions: notebooks/solutions/00.md."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import isclose

from checks.exercise import exercise
from moe_lab import Trainer, load_config
from moe_lab.config import ROOT
from moe_lab.health import RULES

AS_REPORTED = ROOT / "configs" / "training_1.5b_as_reported.yaml"
SMALL = ROOT / "configs" / "smoke.yaml"


def line_of(start: str) -> int:
    """Number of the line of the case's config that begins with `start`, blanks aside."""
    lines = AS_REPORTED.read_text(encoding="utf-8").splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if line.strip().startswith(start)]
    return number


@exercise
def check_named(named: Mapping[str, int]) -> None:
    """`named`: rule → line of the case's config, of what preflight calls an error or a warning."""
    of_format, of_rate = line_of("parameters:"), line_of("max_lr:")
    assert named and None not in {*named, *named.values()}, "nothing is written yet in one of its places: {rule: line}"
    unknown = sorted(set(named) - set(RULES))
    assert not unknown, f"no rule is called {unknown and unknown[0]!r}: copy the name from the finding"
    assert len(set(named.values())) > 1, "the report has two causes, and they stand in two lines"
    assert "bf16_parameters" in named, "one finding is about the number format of the parameters"
    assert named["bf16_parameters"] == of_format, "the number after the colon of `where` is the line"
    rates = {rule: line for rule, line in named.items() if rule in ("lr_too_low", "muon_convention")}
    assert rates, "the other finding is about a learning rate: leave none out that is at least a warning"
    assert set(rates.values()) == {of_rate}, f"the learning rate stands in line {of_rate}"
    assert len(named) == 1 + len(rates), "leave out what is neither an error nor a warning, or not in that file"
    assert len(named) == 3, f"{len(named)} of 3: one more is an error or a warning in a line that you already have"


@exercise
def check_overrides(overrides: Sequence[str]) -> None:
    """`overrides` with which the small run has one prediction head."""
    assert not isinstance(overrides, str), "a list of texts, one for each setting"
    config, given = load_config(SMALL, [*overrides, "training.device=cpu"]), load_config(SMALL)
    assert config.training.steps == given.training.steps, "leave the number of steps as it was"
    with tempfile.TemporaryDirectory() as folder:
        (report,) = Trainer(config, folder).steps(until=1)
    terms = {name: float(value) for name, value in report.losses.items()}
    assert not any(name.startswith("future") for name in terms), (
        f"step 1 still has the terms {', '.join(terms)}: a head for a later token is there"
    )
    start = math.log(given.model.vocab_size) + given.model.d_model * given.model.init_std**2 / 2
    assert abs(terms["next_token"] - start) < 0.1, (
        f"next_token is {terms['next_token']:.2f}, and this model, untrained, shows {start:.2f}: change the heads alone"
    )


@exercise
def check_next_token_loss(loss: Callable) -> None:
    """`loss(row, weights)`: the next token's loss of a record's row, nats per token."""
    one_head = {"losses": {"next_token": 6.0, "moe_balance": 0.02}}
    assert isclose(loss(one_head, (1.0,)), 6), (
        "with one head the weight is 1: take the term next_token, and leave the routers' terms out"
    )
    found = loss({"losses": {"next_token": 4.0, "future_2": 2.1, "moe_balance": 0.02}}, (1.0, 0.5))
    assert not isclose(found, 4), "the record holds weighted terms; undo the weight of the first head"
    assert isclose(found, 6), (
        "weights 1.0 and 0.5 are normalised to sum 1, so the first head counts 2/3: divide by that"
    )
    found = loss({"losses": {"next_token": 4.0, "future_2": 2.1}}, (2.0, 1.0))
    assert isclose(found, 6), "weights 2.0 and 1.0 are the same shares as 1.0 and 0.5"
