"""Checks of notebook 04a's exercises. Solutions: notebooks/solutions/04a.md."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping

import numpy as np

from checks.exercise import exercise
from moe_lab import Trainer, load_config
from moe_lab.config import ROOT, Config
from moe_lab.data import Batches

N_UPDATES = 20  # that a patient has behind it
WORDS = ("healthy", "random tokens", "rounded away", "a rate too low")
PATIENTS = {"A": "rounded away", "B": "a rate too low", "C": "random tokens", "D": "healthy"}


def healthy_config() -> Config:
    """Seconds: two dense layers of width 64 at rates that train."""
    model = {
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "d_ff": 128,
        "max_seq_len": 64,
        "dropout": 0.0,
    }
    model |= {"moe_layers": (), "mod_enabled": False, "mamba_enabled": False, "mamba_layers": ()}
    training = {"steps": 120, "warmup_steps": 10, "min_lr_ratio": 1.0, "gradient_accumulation_steps": 1, "max_lr": 1e-2}
    optimizer = {"adamw_lr_ratio": 1.0, "embedding_lr_ratio": None}
    config = load_config(ROOT / "configs" / "smoke.yaml")
    return config.with_(model=model, training=training | {"device": "cpu"}, optimizer=optimizer)


def sick_config() -> Config:
    """One rate is a hundredth of what it should be."""
    return healthy_config().with_(optimizer={"embedding_lr_ratio": 0.01})


def patient(name: str) -> Trainer:
    """A trainer `N_UPDATES` updates after its start, with nothing or one thing wrong."""
    sickness = PATIENTS[name]
    config = sick_config() if sickness == "a rate too low" else healthy_config()
    if sickness == "rounded away":
        low = {"training": {"max_lr": 2e-3}, "precision": {"parameters": "bfloat16"}}
        config = config.with_(**low)
    trainer = Trainer(config, tempfile.mkdtemp())
    if sickness == "random tokens":
        size = trainer.config.model.vocab_size
        tokens = np.random.default_rng(0).integers(0, size, 200_000).astype(np.uint16)
        trainer.batches = Batches(tokens, config.model.max_seq_len, config.training.batch_size, 0)
    for _ in trainer.steps(until=N_UPDATES):
        pass
    return trainer


@exercise
def check_diagnoses(answer: Mapping[str, str]) -> None:
    """`answer`: what is wrong with each patient."""
    assert set(answer) == set(PATIENTS), f"answer with a dict of {', '.join(PATIENTS)}"
    assert set(answer.values()) <= set(WORDS), f"the words are {', '.join(map(repr, WORDS))}"
    wrong = {name for name, sickness in PATIENTS.items() if answer[name] != sickness}
    for name in sorted(wrong):
        given, true = answer[name], PATIENTS[name]
        assert {given, true} != {"random tokens", "a rate too low"}, (
            f"{name}: these two have the same curve; count how often two tokens of a batch agree"
        )
        assert true != "rounded away", f"{name}: look at the dtype of its parameters, and at what one update changes"
        assert true != "healthy", (
            f"{name}: what would a higher rate gain? Compare with the others before you call it sick"
        )
        assert given != "healthy", f"{name}: nothing moves as it should; which measurement have you not taken?"
        raise AssertionError(f"{name}: not {given}")


def last_loss(config: Config) -> float:
    """Mean training loss of the last ten of 80 updates."""
    with tempfile.TemporaryDirectory() as folder:
        losses = [report.losses["next_token"].item() for report in Trainer(config, folder).steps(until=80)]
    return math.fsum(losses[-10:]) / 10


@exercise
def check_cure(cure: Callable[[Config], Config]) -> None:
    """`cure(config)`: another config, with Muon's rate as it was."""
    before = sick_config()
    after = cure(before)
    assert isinstance(after, Config), "return a config: `return config.with_(optimizer={…})`"
    assert after.training.max_lr == before.training.max_lr, "`training.max_lr` is Muon's rate: leave it"
    assert after.model == before.model and after.data == before.data, "change the optimizer alone"
    assert after != before, "nothing has changed"
    gained = last_loss(before) - last_loss(after)
    assert gained > 0.15, f"this gains {gained:.2f} nats over 80 updates; probe the config: which group gains most?"


@exercise
def check_shares(shares_of_two: Callable) -> None:
    """`shares_of_two(none, muon, adamw, both)`, losses with no fix, with one, with both: Muon's share and AdamW's, in nats."""
    shares = tuple(round(share, 9) for share in shares_of_two(6.8, 6.7, 6.2, 6.0))
    assert sum(shares) > 0, "a fix that lowers the loss earned something: its share is positive"
    assert shares != (0.1, 0.6), (
        "each fix alone gives 0.1 and 0.6, together they gave 0.8: your shares leave 0.1 to nobody"
    )
    one_order = shares in ((0.1, 0.7), (0.2, 0.6))
    assert not one_order, "this is one order of fixing; take the mean over both orders"
    assert math.isclose(sum(shares), 0.8), "the shares must sum to what both together gave, 0.8"
    assert shares == (0.15, 0.65), "Muon's fix is worth 0.1 if it comes first and 0.2 if it comes last"
