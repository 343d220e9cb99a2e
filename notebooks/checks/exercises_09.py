"""Checks of notebook 09's exercises. Solutions: notebooks/solutions/09.md."""

from __future__ import annotations

from collections.abc import Sequence

from moe_lab import load_config, plan
from moe_lab.config import ROOT, Config
from moe_lab.course.lessons import exercise

CARD_GB = 24
LEAST_TOKENS = 131_072


def reported() -> Config:
    """The case as it ran."""
    return load_config(ROOT / "configs" / "training_1.5b_as_reported.yaml")


@exercise
def check_settings(settings: Sequence[str]) -> None:
    """Float32 parameters, not one weight fewer, on a card of CARD_GB."""
    assert not isinstance(settings, str), "settings is a list of texts, such as ['training.batch_size=1']"
    path = ROOT / "configs" / "training_1.5b_as_reported.yaml"
    config, ours = load_config(path, settings), reported()
    assert config.model == ours.model, "the model must stay what it is: change how it is trained"
    assert config.precision.parameters == "float32", (
        "bf16 parameters lose the updates: that is the sickness, not the cure"
    )
    size = sum(plan.memory(config)) / 1e9
    assert size < CARD_GB, f"{size:.1f} GB are planned; what is kept for the backward pass can be computed again"


@exercise
def check_tokens(tokens: int) -> None:
    """The smallest power of two of tokens an update at which Muon makes less than a tenth of the arithmetic."""

    def share(n: int) -> float:
        found = plan.flops(reported())
        passes = found.passes * n / reported().tokens_per_step
        return found.optimizer / (found.optimizer + passes)

    assert isinstance(tokens, int) and tokens > 0 and tokens & (tokens - 1) == 0, "a power of two"
    assert share(tokens) < 0.1, f"at {tokens:,} tokens Muon still makes {share(tokens):.0%}"
    assert share(tokens // 2) >= 0.1, f"half as many, {tokens // 2:,}, would do"
