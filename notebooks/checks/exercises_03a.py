"""Checks of notebook 03a's exercises. Solutions: notebooks/solutions/03a.md."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checks.exercise import exercise
from checks.runs_bf16 import Run
from moe_lab.config import Config, load_config, to_yaml
from moe_lab.optim.schedule import lr_share

STATES = {"float32": "float32", "bf16": "updates lost", "masters": "bf16, nothing lost"}
REFUTED = {  # what speaks against each answer where it is wrong: the right one is the reader's to find
    "float32": "look at the dtype of its tensors",
    "updates lost": "inspect_checkpoint names no tensor of it that has never moved",
    "bf16, nothing lost": "look at the dtype of its tensors, and at what the optimizer's state keeps beside the moments",
}


@exercise
def check_frozen_from(frozen_from: Callable) -> None:
    """`frozen_from(peak, n_steps)`: the first update whose largest step is lost, as all later ones are."""

    def right(peak: float, n_steps: int) -> int:
        reach = 1.165 * peak
        return next(t for t in range(1, n_steps + 1) if reach * lr_share(t, n_steps, 0, 0.0) <= 2**-9)

    assert frozen_from(1e-3, 100) == 1, "a peak of 1e-3 moves no norm at all: frozen from the first update"
    got, wanted = frozen_from(1e-2, 200), right(1e-2, 200)
    other = next(t for t in range(1, 201) if 1e-2 * lr_share(t, 200, 0, 0.0) <= 2**-9)
    assert got != other, "the largest step of AdamW is 1.165 times its learning rate"
    assert got > 100, f"at half of the cosine the rate is still 5e-3, and moves a norm; you say {got}"
    assert got == wanted, f"with a peak of 1e-2 over 200 updates it is update {wanted - 5} or a little later, not {got}"
    assert all(frozen_from(p, n) == right(p, n) for p, n in ((2e-3, 50), (4e-3, 1000), (3e-2, 640))), (
        "right for one cosine, wrong for others: the peak and the number of steps both count"
    )


def shuffled_states(seed: int) -> dict[str, str]:
    """Which run's checkpoint each letter is: another order for another seed."""
    return dict(zip("ABC", random.Random(f"checkpoints {seed}").sample(list(STATES), len(STATES)), strict=True))


def checkpoints(runs: Mapping[str, Run], seed: int) -> dict[str, Path]:
    """A checkpoint of each of three runs, by letter."""
    folder = Path(tempfile.mkdtemp())
    paths = {letter: folder / f"{letter}.pt" for letter in "ABC"}
    for letter, name in shuffled_states(seed).items():
        runs[name].trainer.save(paths[letter])
    return paths


@exercise
def check_states(named: Mapping[str, str], seed: int) -> None:
    """`named`: the letter of each of `checkpoints` → one of STATES' values."""
    words = ", ".join(STATES.values())
    assert set(named) == set("ABC") and set(named.values()) <= set(STATES.values()), (
        f"name all three, A to C, and use these words: {words}"
    )
    right = {letter: STATES[run] for letter, run in shuffled_states(seed).items()}
    wrong = [letter for letter in "ABC" if named[letter] != right[letter]]
    assert not wrong, f"{wrong[0]} is not {named[wrong[0]]!r}: {REFUTED[named[wrong[0]]]}"


@exercise
def check_overrides(overrides: Sequence[str], falling: Config) -> None:
    """`overrides` mend the schedule of the falling run; it is trained with for 40 updates."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "falling.yaml"
        path.write_text(to_yaml(falling), encoding="utf-8")
        mended = load_config(path, overrides).with_(training={"steps": 40})
    assert mended.precision.parameters == "bfloat16", (
        "that cures it, and leaves bf16: here the schedule is to be mended"
    )
    assert peaks(mended) == peaks(falling), "keep the peak: the schedule's end is what freezes the norms"
    run = Run(mended).train(40)
    assert any(not a.equal(b) for a, b in zip(run.norms[-5:-1], run.norms[-4:], strict=True)), (
        f"no norm weight moves in the last four updates: AdamW's rate ends at {run.rows[-1]['lr']:.2g}, and under 1.7e-3 none can"
    )


def peaks(config: Config) -> tuple[Any, ...]:
    return config.training.max_lr, config.optimizer.adamw_lr_ratio
