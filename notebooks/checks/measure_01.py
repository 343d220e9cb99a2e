"""What notebook 01 measures beside its own cells: whether tokens are text, and runs that look alike."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from checks.designs import with_lrs
from checks.figures_00 import curve
from checks.figures_01 import Figures, two_curves
from moe_lab import Trainer
from moe_lab.config import Config, DataConfig
from moe_lab.data import Batches
from moe_lab.failures.results import Results
from moe_lab.health import measures
from moe_lab.show.front import is_interactive
from moe_lab.show.style import show, to_html

REDRAW_S = 1.0
# A small dense model, the same in every profile; only the vocabulary is the profile's own. Its start values are as large as
# it takes to spread the logits as at the case's width: v/2 = 1536 · 0.02² / 2.
WIDTH, WINDOW, BATCH, WARMUP = 64, 64, 8, 5
HALF_VARIANCE = 1536 * 0.02**2 / 2


def at_most(data: DataConfig, n_bytes: int) -> DataConfig:
    """The same data, of web text no more than `n_bytes`."""
    return replace(data, max_bytes=min(data.max_bytes, n_bytes)) if data.source.startswith("hf:") else data


def collisions(tokens: np.ndarray, vocab_size: int) -> float:
    """`measures.collisions` of an array, as a batch is one here."""
    return measures.collisions(torch.as_tensor(np.asarray(tokens).astype(np.int64)), vocab_size)


def crossings(results: Results, level: float) -> dict[str, int | None]:
    """Each arm's first reading of the training loss, mean over seeds, that is below `level`: its update; None: none is."""
    found = {}
    for arm in results.arms():
        steps, losses = curve(results, arm)
        found[arm] = next(iter(steps[losses.mean(axis=0) < level].tolist()), None)
    return found


class Sick(NamedTuple):
    """A run of the small model: how its learning rates are called, both of them, and the tokens that it reads."""

    lrs: tuple[float, float]  # Muon's and AdamW's
    tokens: np.ndarray


def small_config(config: Config, lrs: tuple[float, float], n_updates: int) -> Config:
    model = {"d_model": WIDTH, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 2 * WIDTH, "max_seq_len": WINDOW}
    model |= {"moe_layers": (), "mod_enabled": False, "mamba_enabled": False, "mamba_layers": (), "dropout": 0.0}
    model |= {"n_pred_tokens": 1, "aux_loss_weights": (1.0,), "init_std": math.sqrt(2 * HALF_VARIANCE / WIDTH)}
    training = {"steps": n_updates, "batch_size": BATCH, "gradient_accumulation_steps": 1}
    training |= {"warmup_steps": WARMUP, "min_lr_ratio": 1.0, "log_interval": 50}
    return with_lrs(config, *lrs).with_(model=model, training=training, precision={"compute": "float32"})


def train_side_by_side(
    config: Config, runs: Mapping[str, Sick], n_updates: int, draw: Callable
) -> dict[str, list[float]]:
    """Train every run an update at a time, in turn, from the same start values, and show `draw(losses)` as it goes (headless:
    once, at the end). Returns the training losses, nats per token; an interrupt ends all runs and keeps what there is."""
    losses: dict[str, list[float]] = {name: [] for name in runs}
    live = is_interactive()
    if live:
        from IPython.display import display

        handle = display(to_html(*draw(losses)), raw=True, display_id=True)
    with tempfile.TemporaryDirectory() as folder:
        steps = {}
        for name, run in runs.items():
            trainer = Trainer(small_config(config, run.lrs, n_updates), f"{folder}/{name}")
            trainer.batches = Batches(run.tokens, WINDOW, BATCH, config.training.seed)
            steps[name] = trainer.steps()
        drawn = time.monotonic()
        try:
            for _ in range(n_updates):
                for name, updates in steps.items():
                    losses[name].append(float(sum(next(updates).losses.values())))
                if live and time.monotonic() - drawn > REDRAW_S:
                    drawn = time.monotonic()
                    handle.update(to_html(*draw(losses)), raw=True)
        except KeyboardInterrupt:
            print(f"interrupted after {min(map(len, losses.values()))} updates")
        finally:
            for updates in steps.values():
                updates.close()
    handle.update(to_html(*draw(losses)), raw=True) if live else show(*draw(losses))
    return losses


def shuffled(letters: Sequence[str], one: Sick, other: Sick, seed: int) -> dict[str, Sick]:
    """Both under letters that the seed deals."""
    return dict(zip(letters, random.Random(f"alike {seed}").sample([one, other], 2), strict=True))


def drawing(title: str, levels: Mapping[str, float], n_updates: int) -> Callable[[Mapping[str, list[float]]], Figures]:
    """What `train_side_by_side` draws with."""
    return lambda losses: two_curves(losses, levels, title, n_updates)


def first_batches(tokens: np.ndarray, seed: int, n: int = 4) -> np.ndarray:
    """What a run's first `n` updates read, (n · B, T + 1)."""
    batches = Batches(tokens, WINDOW, BATCH, seed)
    return np.concatenate([batches.next_batch().numpy() for _ in range(n)])


def fall(losses: list[float], n: int = 10) -> float:
    """Mean of the first `n` losses minus that of the last."""
    return float(np.mean(losses[:n]) - np.mean(losses[-n:]))
