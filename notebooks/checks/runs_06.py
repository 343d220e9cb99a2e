"""The runs of notebook 06: a sick one, what is left of it when its data are mended, and a healthy control.

What is wrong with them stands here and not in the notebook. A patient's bugs are in the package only inside `with
patient.code():`, so it is trained, measured and looked at there.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter

import torch
from torch import Tensor, nn

from moe_lab import Trainer
from moe_lab.config import ROOT, Config, load_config
from moe_lab.course.notebook import Lab
from moe_lab.failures.bugs import planted
from moe_lab.failures.experiments import validation_loss
from moe_lab.health import choices
from moe_lab.model import build_model
from moe_lab.model.depth import Depth
from moe_lab.show.plots import next_token_weight

FIRST = ("B03", "B04", "B05", "B06", "B08", "B17")
SECOND = tuple(id for id in FIRST if id != "B08")  # the data mended
UPDATES = {"smoke": 80}  # in other profiles LONG
LONG = 240
HELD_OUT = 8_000  # tokens of the validation split that a small model is held against


def small_config(seed: int = 0, steps: int = LONG) -> Config:
    """Profile smoke's model in each profile: what is looked at here are wires, and these do not grow with the width."""
    training = {"steps": steps, "seed": seed, "gradient_accumulation_steps": 1, "min_lr_ratio": 1.0, "device": "cpu"}
    return load_config(ROOT / "configs" / "smoke.yaml").with_(training=training, model={"dropout": 0.0})


class Patient:
    """A trainer whose code has bugs, its losses (nats per token of the next token) and its validation loss on real text."""

    def __init__(self, config: Config, *bugs: str):
        self.bugs, self.losses = bugs, []
        self.said = io.StringIO()  # what its code printed
        with self.code(), contextlib.redirect_stdout(self.said):
            self.trainer = Trainer(config, tempfile.mkdtemp())

    def code(self) -> contextlib.AbstractContextManager[None]:
        """The package as it was for this run."""
        return planted(*self.bugs)

    def train(self) -> Patient:
        with self.code():
            weight = next_token_weight(self.trainer.config)
            self.losses = [report.losses["next_token"].item() / weight for report in self.trainer.steps()]
            self.validation = validation_loss(self.trainer, HELD_OUT)
        return self

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def end(self) -> float:
        """Mean training loss of the last ten updates."""
        return sum(self.losses[-10:]) / 10

    def batches(self, n: int = 8) -> list[tuple[Tensor, Tensor]]:
        """Ids and labels that the run reads next."""
        found = [self.trainer.batches.next_batch() for _ in range(n)]
        return [(ids[:, :-1], ids[:, 1:]) for ids in found]


def patients(lab: Lab) -> dict[str, Patient]:
    """The first patient and its control: same start values, same budget."""
    config = small_config(lab.config.training.seed, UPDATES.get(lab.profile, LONG))
    return {"the run": Patient(config, *FIRST).train(), "its control": Patient(config).train()}


def mended_data(lab: Lab) -> Patient:
    """The first patient with text in place of random tokens."""
    return Patient(small_config(lab.config.training.seed, UPDATES.get(lab.profile, LONG)), *SECOND).train()


def tokens(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All ids of some batches, in one row."""
    return torch.cat([ids.flatten() for ids, _ in batches])


def untouched(patient: Patient) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the patient's model that no update has touched; its seed is 7."""
    return build_model(patient.trainer.config.model, seed=7).state_dict()


# ---- tools ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def heard_before(model: nn.Module, ids: Tensor, at: int) -> float:
    """Change the tokens of ids (B, T) from place `at` on and hold every choice as it was: the largest change of a logit before
    that place, over the logits' standard deviation. In training mode."""
    other, made = ids.clone(), []
    other[:, at:] = (other[:, at:] + 1) % model.config.vocab_size
    model.train()
    with choices.recorded(made):
        before = model(ids).logits
    with choices.held(made):
        after = model(other).logits
    return ((after - before)[:, :at].abs().max() / before.std()).item()


@torch.no_grad()
def calls(model: nn.Module, ids: Tensor) -> Counter:
    """How often a router of Mixture-of-Depths computes, in training and in evaluation."""
    heard: Counter = Counter(training=0, evaluation=0)
    routers = [m.router for m in model.modules() if isinstance(m, Depth)]
    hooks = [r.register_forward_hook(lambda *_: heard.update([mode])) for r in routers]
    for mode in heard:
        model.train(mode == "training")(ids)
    for hook in hooks:
        hook.remove()
    return heard


@torch.no_grad()
def growth(model: nn.Module, ids: Tensor) -> list[float]:
    """The size of a hidden state after each layer over its size before, a number each for tokens that both sublayers skip."""
    x, ratios = model.embedding(ids), []
    for block in model.train().layers:
        y, _, reports = block(x)
        skipped = ~(reports[0].chosen | reports[1].chosen)
        ratios += (y[skipped].norm(dim=-1) / x[skipped].norm(dim=-1)).tolist()
        x = y
    return ratios


def router_gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Norm of the gradient that one batch gives each of Mixture-of-Depths' routers."""
    ids, labels = batch
    model.zero_grad()
    sum(model.train().losses(torch.cat([ids, labels[:, -1:]], dim=1)).values()).backward()
    named = ((name, p) for name, p in model.named_parameters() if "depth.router" in name)
    norms = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in named}
    model.zero_grad()
    return norms


@torch.no_grad()
def places(model: nn.Module, ids: Tensor) -> list[int]:
    """The places that the first layer's sequence sublayer is given for the tokens that it computes, in training."""
    seen: list[Tensor] = []
    hook = model.layers[0].seq_layer.register_forward_hook(lambda _, given, __: seen.append(given[1][0]))
    model.train()(ids)
    hook.remove()
    return seen[0].tolist()
