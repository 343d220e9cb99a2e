"""Checks of notebook 09's exercises. Solutions: notebooks/solutions/09.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from checks.exercise import exercise
from moe_lab import health, load_config, plan
from moe_lab.config import ROOT, Config, to_dict
from moe_lab.model import count_parameters

CARD_GB = 24
WORDS = ("sound", "a learning rate", "the schedule", "the batch")
CHANGES = {  # what differs from the cured config with 512 micro-batches an update
    "A": ["training.warmup_steps=4000", "training.steps=3000"],
    "B": ["training.gradient_accumulation_steps=4"],
    "C": [],
    "D": ["training.max_lr=0.05"],
}
HINTS = {
    "sound": "preflight has nothing to say of it, and its work is in its passes: what is left to accuse it of?",
    "a learning rate": "look at the rates that preflight prints, of each optimizer",
    "the schedule": "how many of its updates run at the peak rate? preflight counts them",
    "the batch": "preflight counts no operations; `plan.flops` does",
}


def reported() -> Config:
    """The case as it ran."""
    return load_config(ROOT / "configs" / "training_1.5b_as_reported.yaml")


def sent() -> dict[str, Config]:
    """Four plans for the case's model, each with nothing or one thing wrong."""
    path = ROOT / "configs" / "training_1.5b.yaml"
    return {
        name: load_config(path, ["training.gradient_accumulation_steps=512", *more]) for name, more in CHANGES.items()
    }


@exercise
def check_trouble(trouble: Mapping[str, str]) -> None:
    """`trouble`: what is wrong with each plan, found by the tools and not by what was changed."""
    assert isinstance(trouble, Mapping) and set(trouble) == set(CHANGES), f"a dict of {', '.join(CHANGES)}"
    assert set(trouble.values()) <= set(WORDS), f"the words are {', '.join(map(repr, WORDS))}"
    for name, config in sent().items():
        assert trouble[name] == (wrong := trouble_of(config)), f"{name}: {HINTS[wrong]}"


def trouble_of(config: Config) -> str:
    rules = {f.rule for f in health.preflight(to_dict(config), count_parameters(config.model).total)}
    if "schedule" in rules:
        return "the schedule"
    if rules & {"lr_too_high", "muon_convention", "lr_too_low"}:
        return "a learning rate"
    work = plan.flops(config)
    return "the batch" if work.optimizer > sum(work) / 2 else "sound"


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
