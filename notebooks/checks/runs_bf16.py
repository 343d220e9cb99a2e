"""The short runs of notebooks 03 and 03a: a sick one and its control, an update at a time, with what the lessons look at."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory

import torch
from IPython.display import display
from torch import Tensor

from checks.figures_03 import pair_figure
from checks.remedies import PARTLY, REMEDIES
from moe_lab import health
from moe_lab.config import Config
from moe_lab.failures.experiments import make_trainer
from moe_lab.show.front import is_interactive
from moe_lab.show.plots import next_token_weight
from moe_lab.show.style import show, to_html

# the first fragment that a tensor's name contains decides its family
FAMILIES = {
    "norm.weight": "norms",
    "router": "routers",
    "predictor": "MoD predictors",
    "A_log": "Mamba A_log",
    "seq_layer.D": "Mamba D",
    "dt_proj.bias": "Mamba dt_proj.bias",
    "dt_proj": "Mamba dt_proj.weight",
    "conv1d": "Mamba conv1d",
    "in_proj": "Mamba in, x, out_proj",
    "x_proj": "Mamba in, x, out_proj",
    "out_proj": "Mamba in, x, out_proj",
    "seq_layer": "attention matrices",
    "ffn": "feed-forward, experts",
    "embedding": "embedding",
    "lm_heads": "heads",
}
GROUPS = {  # what the lessons put together
    "norms": ("norms",),
    "Mamba's vectors": ("Mamba A_log", "Mamba D", "Mamba dt_proj.bias", "Mamba conv1d"),
    "matrices": ("attention matrices", "feed-forward, experts", "Mamba in, x, out_proj"),
    "embedding, heads": ("embedding", "heads"),
}


def family(name: str) -> str:
    return next(title for fragment, title in FAMILIES.items() if fragment in name)


def of_group(values: Mapping[str, Tensor], group: str) -> Tensor:
    """The elements of all tensors of a group in one row."""
    return torch.cat([value.flatten() for name, value in values.items() if family(name) in GROUPS[group]])


class Run:
    """A training with a bug in it, or with a remedy for bf16 parameters, watched from before its first update.

    `start` holds float32 copies of the start values, `rows` a row an update, `norms` the norm weights before the first
    update and after each.
    """

    def __init__(self, config: Config, bug: Callable | None = None, remedy: str | None = None):
        if remedy is not None and not remedy.endswith("in float32"):
            config = config.with_(precision={"parameters": "bfloat16"})
        self.folder = TemporaryDirectory()
        self.trainer = make_trainer(config, remedy and (REMEDIES | PARTLY)[remedy], self.folder.name)
        if bug is not None:
            bug(self.trainer.model)
        # a watch replays a few of Muon's matrices, to be cheap; here it replays all of them
        self.watch = health.Watch(self.trainer.model, self.trainer.optimizers, n_matrices=10**6, quiet=True)
        self.start = self.weights()
        self.norms = [of_group(self.start, "norms")]
        self.rows: list[dict[str, float]] = []
        self.updates = self.trainer.steps()

    def weights(self) -> dict[str, Tensor]:
        """The parameters now, as float32 copies."""
        return {name: p.detach().float().cpu().clone() for name, p in self.trainer.model.named_parameters()}

    def step(self) -> None:
        report = next(self.updates)
        now = torch.cat([p.detach().float().cpu() for p in self.trainer.readings.norms])
        loss = report.losses["next_token"].item() / next_token_weight(self.trainer.config)
        norm_step = (now - self.norms[-1]).square().mean().sqrt().item()
        self.norms.append(now)
        self.rows.append(
            {
                "step": report.step,
                "loss": loss,
                "furthest": self.furthest(),
                "norm_step": norm_step,
                "lr": report.lr["adamw"],
            }
        )

    def furthest(self) -> float:
        """Largest distance of a norm weight from 1."""
        return (self.norms[-1] - 1).abs().max().item()

    def bytes_per_parameter(self) -> float:
        """Of weight, gradient (as wide as the weight) and the optimizers' state."""
        weights = list(self.trainer.model.parameters())
        states = (state for optimizer in self.trainer.optimizers for state in optimizer.state.values())
        kept = sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor) and t.ndim)
        return (2 * sum(p.nbytes for p in weights) + kept) / sum(p.numel() for p in weights)

    def train(self, until: int) -> Run:
        while len(self.rows) < until:
            self.step()
        return self.finish()

    def finish(self) -> Run:
        """End the run: its record is written, its watch has had its last look."""
        self.updates.close()
        self.watch.check()
        self.watch.close()
        return self


def train_side_by_side(runs: Mapping[str, Run], until: int) -> None:
    """Train runs in turn, an update each, with one figure of both: drawn as they go where somebody watches, else once.

    A `LivePair` has buttons as well, and shows what watches find; here that would answer what the notebook asks next.
    """
    watched, handle, drawn = is_interactive(), None, -1e9
    for _ in range(until):
        for run in runs.values():
            run.step()
        if watched and time.monotonic() - drawn > 1:
            picture, drawn = to_html(*pair_figure(runs)), time.monotonic()
            handle = (
                handle.update(picture, raw=True) or handle if handle else display(picture, raw=True, display_id=True)
            )
    for run in runs.values():
        run.finish()
    if handle:
        handle.update(to_html(*pair_figure(runs)), raw=True)
    else:
        show(*pair_figure(runs))
