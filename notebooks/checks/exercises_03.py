"""Checks of notebook 03's exercises. Solutions: notebooks/solutions/03.md."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import isclose
from pathlib import Path
from typing import Any

from checks.exercise import exercise
from checks.runs_bf16 import Run
from moe_lab import Trainer
from moe_lab.config import Config, load_config, to_yaml
from moe_lab.failures import bugs

CAUSES = ("healthy", "no gradient", "not in the optimizer", "rounded away")
REFUTED = {  # what speaks against each answer where it is wrong: the right one is the reader's to find
    "no gradient": "count the looks that found a gradient at its norms",
    "not in the optimizer": "`not_in_optimizer` is not among its watch's findings",
    "rounded away": "in float32 nothing is rounded away: look at the dtype of its norms",
    "healthy": "its norms stand still: look at `moved_square`",
}


@exercise
def check_lr_to_move(limit: Callable) -> None:
    """`limit(weight)`: the size that an update must exceed to move a bf16 weight *down*."""
    whole = isclose(limit(1.5), 2**-7)
    assert not whole, "an update needs no whole gap: past the middle it rounds to the neighbour"
    assert isclose(limit(1.5), 2**-8), "at 1.5 the gap is 2^-7 on both sides, and half of it is lost"
    assert isclose(limit(1.0), 2**-9), (
        "at a power of two the gap downwards is half of the gap upwards: look at the number line at 1"
    )
    elsewhere = ((0.1, 2**-12), (3.0, 2**-7), (4.0, 2**-7), (0.25, 2**-11))
    assert all(isclose(limit(w), half) for w, half in elsewhere), (
        "right near 1, wrong elsewhere: the gap halves at every power of two"
    )


def shuffled_causes(config: Config) -> dict[str, str]:
    """The cause of each patient, by letter: another order for another seed."""
    order = random.Random(f"patients {config.training.seed}").sample(CAUSES, len(CAUSES))
    return dict(zip("ABCD", order, strict=True))


def patients(config: Config) -> dict[str, Trainer]:
    """Four trainings at their start, by letter: one is healthy, the norms of the others will stand still."""
    made = {}
    for letter, cause in shuffled_causes(config).items():
        trainer = Trainer(config, tempfile.mkdtemp())
        if cause == "rounded away":
            bugs.cast_parameters(trainer.model)
        elif cause == "not in the optimizer":
            trainer.optimizers = bugs.forget_group(trainer.optimizers, "adamw")
        elif cause == "no gradient":
            for name in [name for name, _ in trainer.model.named_modules() if name.endswith("norm")]:
                bugs.detach_output(trainer.model, name)
        made[letter] = trainer
    return made


@exercise
def check_causes(named: Mapping[str, str], config: Config) -> None:
    """`named`: the letter of each of `patients` → one of CAUSES."""
    assert set(named) == set("ABCD") and set(named.values()) <= set(CAUSES), (
        f"name all four trainings, A to D, and use these words: {', '.join(CAUSES)}"
    )
    right = shuffled_causes(config)
    wrong = [letter for letter in "ABCD" if named[letter] != right[letter]]
    assert not wrong, f"{wrong[0]} is not {named[wrong[0]]!r}: {REFUTED[named[wrong[0]]]}"


@exercise
def check_overrides(overrides: Sequence[str], config: Config) -> None:
    """`overrides` mend the sick config; they are trained with for 25 updates."""
    sick = config.with_(precision={"parameters": "bfloat16"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sick.yaml"
        path.write_text(to_yaml(sick), encoding="utf-8")
        mended = load_config(path, overrides)
    assert rates(mended) == rates(config), (
        "keep the case's learning rates: a larger step hides lost updates for a while, and is another experiment"
    )
    run = Run(mended).train(25)
    now = run.weights()
    frozen = [name for name, value in run.start.items() if name.endswith("norm.weight") and value.equal(now[name])]
    assert not frozen, f"{len(frozen)} norm tensors still stand where they began: what are the parameters kept in?"
    lost = [finding for finding in run.watch.findings if finding.rule == "lost_updates"]
    assert not lost, f"the watch still says {lost and lost[0].message}"


def rates(config: Config) -> tuple[Any, ...]:
    optimizer = config.optimizer
    return config.training.max_lr, optimizer.type, optimizer.adamw_lr_ratio, optimizer.adjust_lr
