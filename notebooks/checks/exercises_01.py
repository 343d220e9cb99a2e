"""Checks of notebook 01's exercises. Solutions: notebooks/solutions/01.md."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isclose
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from checks.exercise import exercise
from moe_lab import build_model
from moe_lab.config import Config, ConfigError, load_config, to_yaml
from moe_lab.data.prepare import Dataset

DIAGNOSES = ("random tokens", "frequencies only", "beats the tables", "another number")
SUSPECTS = ("text", "random tokens", "shuffled text", "padding")
WINDOWS, LENGTH = 16, 64  # of each suspect


@exercise
def check_step_0_loss(loss: Callable) -> None:
    """`loss(vocab_size, d_model, init_std)` that is expected of an untrained model, nats per token."""
    uniform = math.log(4096)
    assert isclose(loss(4096, 192, 0.0), uniform, abs_tol=1e-9), (
        "with init_std 0 every logit is 0, so every token has probability 1/V: the loss is the natural log of V"
    )
    added = loss(4096, 192, 0.1) - uniform
    assert abs(added) > 1e-8, "you give ln V whatever init_std is; logits that differ cost something on top"
    assert not isclose(added, 1.92, rel_tol=1e-6), "you add the whole variance of the logits; half of it is the cost"
    assert isclose(loss(50257, 1536, 0.02) - math.log(50257), 0.3072, rel_tol=1e-3), (
        "the variance of a logit is d_model * init_std**2: a sum of d_model terms, each of variance init_std**2"
    )


@exercise
def check_override(override: str, config: Config, dataset: Dataset) -> None:
    """`override`: one setting with which the model of `config` starts about 1 nat above ln V; it is built and measured."""
    assert isinstance(override, str), 'one text, such as "section.key=value"'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        try:
            changed = load_config(path, [override])
        except ConfigError as error:
            raise AssertionError(str(error)) from None
    assert changed.model != config.model, f"{override} does not change the model that is built"
    before, after = (replace(each.model, vocab_size=dataset.vocab_size) for each in (config, changed))
    shapes = [[p.shape for p in build_model(model, seed=0).parameters()] for model in (before, after)]
    assert shapes[0] == shapes[1], f"{override} changes the shapes of tensors: leave the architecture as it is"
    above = start_of(build_model(after, seed=0), dataset) - math.log(dataset.vocab_size)
    assert above > 0.8, f"it starts {above:.2f} nats above ln V, which is too near"
    assert above < 1.2, f"it starts {above:.2f} nats above ln V, which is too far"


@torch.no_grad()
def start_of(model: torch.nn.Module, dataset: Dataset) -> float:
    """Loss of the untrained model on 4,096 targets of the validation split, nats per token."""
    length = model.config.max_seq_len
    tokens = torch.from_numpy(dataset.validation[: length * (4096 // length)].astype(np.int64)).view(-1, length)
    logits = model.eval()(tokens[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).item()


def suspects(dataset: Dataset, seed: int) -> dict[str, np.ndarray]:
    """Four batches in an order that the seed decides: letter → tokens, (WINDOWS, LENGTH)."""
    return {letter: tokens for letter, (_, tokens) in dealt(dataset, seed).items()}


def dealt(dataset: Dataset, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Letter → what the batch is, and its tokens."""
    rng = np.random.default_rng(seed + 1)
    n = WINDOWS * LENGTH
    places = rng.integers(len(dataset.train) - n, size=3)
    text, other, padded = (dataset.train[place : place + n].copy() for place in places)
    rng.shuffle(other)
    padded = padded.reshape(WINDOWS, LENGTH)
    padded[:, LENGTH // 2 :] = padded[0, 0]
    noise = rng.integers(dataset.vocab_size, size=n, dtype=text.dtype)
    batches = [text, noise, other, padded]
    made = [(kind, tokens.reshape(WINDOWS, LENGTH)) for kind, tokens in zip(SUSPECTS, batches, strict=True)]
    return dict(zip("ABCD", random.Random(seed).sample(made, len(made)), strict=True))


@exercise
def check_suspects(named: Mapping[str, str], dataset: Dataset, seed: int) -> None:
    """`named`: letter → one of SUSPECTS, of the batches of `suspects`."""
    assert set(named) == set("ABCD") and set(named.values()) <= set(SUSPECTS), (
        f"name all four, A to D, and use these words: {', '.join(SUSPECTS)}"
    )
    letters = {kind: letter for letter, (kind, _) in dealt(dataset, seed).items()}
    hints = {
        "random tokens": "one batch has collisions × V near 1",
        "padding": "one batch has far more collisions than text: half of it is one token",
        "text": "two batches have the collisions of text; in one of them neighbours do not belong together",
        "shuffled text": "two batches have the collisions of text; in one of them neighbours do not belong together",
    }
    for kind, hint in hints.items():
        assert named[letters[kind]] == kind, hint


def mystery_runs(floors: Mapping[str, float], step_0: float) -> dict[str, tuple[float, float]]:
    """Four made-up runs beside the floors of this corpus: letter → what was shown at step 0 and at the end."""
    return {
        "A": (step_0, floors["unigram"] + 0.02),
        "B": (step_0 * 2 / 3, floors["bigram"] * 2 / 3),  # the record's weighted term, read as if it were the loss
        "C": (step_0, floors["uniform"] + 0.001),
        "D": (step_0, floors["trigram"] - 0.3),
    }


@exercise
def check_diagnosis(named: Mapping[str, str]) -> None:
    """`named`: the letter of each run of `mystery_runs` → one of DIAGNOSES."""
    assert set(named) == set("ABCD") and set(named.values()) <= set(DIAGNOSES), (
        f"name all four runs, A to D, and use these words: {', '.join(DIAGNOSES)}"
    )
    assert named["C"] == "random tokens", (
        "C: which loss is the best that any model can have where there is nothing to learn?"
    )
    assert named["A"] == "frequencies only", "A: beside which table does this run end?"
    assert named["B"] == "another number", "B: look at its start before you look at its end"
    assert named["D"] == "beats the tables", "D: its start is right, and which tables is its end below?"
