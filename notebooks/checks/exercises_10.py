"""What the exercises of notebook 10 are judged by: a patient of your own, and a config to mend. Solutions: solutions/10.md."""

from __future__ import annotations

import random
from functools import partial
from tempfile import mkdtemp

import yaml

from checks.exercise import exercise
from checks.ward import COMMITTED, EXAMPLE, Patient, file_of
from moe_lab import Trainer, health
from moe_lab.config import Config, from_dict, to_dict
from moe_lab.failures import bugs
from moe_lab.health import SICKNESSES
from moe_lab.optim import build_optimizers

N_UPDATES = 60  # of a mended run
GAIN = 0.5  # nats that a mended run must be ahead by then
OF_RATES = {"training.max_lr", "optimizer.adamw_lr_ratio", "optimizer.embedding_lr_ratio"}
# sickness → what is done to the model before its optimizers are made; a missing group is done after
PLANTED = {
    "bf16 parameters": bugs.cast_parameters,
    "branch detached": partial(bugs.detach_output, path="layers.1.ffn"),
    "frozen by accident": partial(bugs.freeze, path="layers.1.seq_layer"),
    "group missing": None,
}


def healthy_config() -> Config:
    """That of the example, whose fault is not in its config."""
    name = next(iter(EXAMPLE))
    return from_dict(yaml.safe_load(Patient(name, COMMITTED / file_of(name)).config))


def drawn(seed: int) -> str:
    return random.Random(f"patient {seed}").choice(list(PLANTED))


def patient(seed: int) -> Trainer:
    """A run that has not begun, with one thing wrong with it."""
    config, sickness = healthy_config().with_(training={"seed": seed}), drawn(seed)
    model = Trainer(config, mkdtemp()).model
    if plant := PLANTED[sickness]:
        plant(model)
    optimizers = build_optimizers(model, config.optimizer, config.training.max_lr)
    if sickness == "group missing":
        optimizers = bugs.forget_group(optimizers, "adamw_decayed")
    return Trainer(config, mkdtemp(), model=model, optimizers=optimizers)


@exercise
def check_patient(rule: str, seed: int) -> None:
    """`rule`: the id of the first finding of at least `warning` that a watch makes of `patient(seed)`."""
    assert isinstance(rule, str) and rule in health.RULES, (
        "give the id of a rule as the watch prints it, such as 'lr_too_low'; health.RULES has all of them"
    )
    assert rule != "weight_decay_on_norms", "an info is no finding of a sickness; look for a warning or an error"
    right = SICKNESSES[drawn(seed)]
    assert rule == right, (
        "did you train at least 25 updates with the watch attached? A rule waits for twenty before it speaks"
    )


def starved_config() -> Config:
    """The example's config with the learning rates of the case's second run: 3e-4 for Muon and 9e-5 for AdamW."""
    optimizer = {"adamw_lr_ratio": 0.3, "embedding_lr_ratio": None}
    return healthy_config().with_(training={"max_lr": 3e-4}, optimizer=optimizer)


def loss_after(config: Config, n_updates: int = N_UPDATES) -> float:
    """Mean loss of the last ten of a few updates."""
    losses = [float(sum(report.losses.values())) for report in Trainer(config, mkdtemp()).steps(until=n_updates)]
    return sum(losses[-10:]) / 10


@exercise
def check_mended(config: Config) -> None:
    """`config`: the starved one with learning rates that train."""
    assert isinstance(config, Config), "give a config: starved.with_(training={…}, optimizer={…})"
    before, after = to_dict(starved_config()), to_dict(config)
    changed = {f"{part}.{key}" for part in before for key in before[part] if before[part][key] != after[part][key]}
    assert changed, "this is still the starved config: with_ returns a new one and leaves the old one as it was"
    assert changed <= OF_RATES, (
        f"one cause at a time: {', '.join(sorted(changed - OF_RATES))} has nothing to do with learning rates, and then "
        "nobody can say what helped"
    )
    warned = [finding for finding in health.preflight(after) if finding.severity != "info"]
    assert not warned, f"preflight is not content yet: {warned[0].message if warned else ''}"
    gain = loss_after(starved_config()) - loss_after(config)
    assert gain > GAIN, (
        f"after {N_UPDATES} updates it is {gain:.2f} nats ahead of the starved run; a tuned one is {GAIN}"
    )
