"""Healthy trainings of one language model in plain torch, under every optimizer at hand and every schedule.

Learning rates are those of the libraries' examples, or the best of 5e-4, 2e-3 and 8e-3 by the final loss, without a look at any
finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import optimi
import pytorch_optimizer
import schedulefree
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.utils.checkpoint import checkpoint

from benchmarks.programs import Make, Program, Rows, update


class Block(nn.Module):
    def __init__(self, d: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = nn.MultiheadAttention(d, 4, dropout=dropout, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(y, y, y, attn_mask=mask.to(y.dtype), is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TinyGPT(nn.Module):
    """Bytes (B, T) to logits (B, T, 256)."""

    def __init__(self, d: int = 64, tied: bool = False, dropout: float = 0.0, recomputed: bool = False):
        super().__init__()
        self.embed, self.position = nn.Embedding(256, d), nn.Embedding(64, d)
        self.blocks = nn.ModuleList(Block(d, dropout) for _ in range(2))
        self.norm, self.head, self.recomputed = nn.LayerNorm(d), nn.Linear(d, 256, bias=False), recomputed
        for table in (self.embed, self.position, self.head):
            nn.init.normal_(table.weight, std=0.02)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recomputed else block(x)
        return self.head(self.norm(x))


def next_token(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    """(B, T + 1) bytes; nats."""
    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten(), **options)


def language(
    seed: int,
    optimizers: Callable[[nn.Module], Any] = lambda model: AdamW(model.parameters(), lr=2e-3),
    schedule: Callable[[Optimizer], Any] | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] = next_token,
    **model: Any,
) -> Program:
    """The tiny GPT under any optimizer, and a schedule that is called after each update."""
    gpt, rows = TinyGPT(**model), Rows(seed, length=65)
    made = optimizers(gpt)
    made = made if isinstance(made, list) else [made]
    scheduler = schedule and schedule(made[0])

    def step(i: int) -> Tensor:
        value = update(made, loss(gpt, rows()))
        if scheduler:
            scheduler.step(*([value] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        return value

    return Program(gpt, made, step, (rows(), next_token))


def one(kind: type, **options: Any) -> Make:
    return partial(language, optimizers=lambda model: kind(model.parameters(), **options))


def grouped(model: nn.Module) -> AdamW:
    """Layer-wise learning rates, lower near the input."""
    blocks = [{"params": block.parameters(), "lr": 2e-3 * 0.8 ** (2 - i)} for i, block in enumerate(model.blocks)]
    ends = {"params": [*model.embed.parameters(), *model.position.parameters()], "lr": 1e-3}
    return AdamW([ends, *blocks, {"params": [*model.norm.parameters(), *model.head.parameters()]}], lr=2e-3)


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0), AdamW(rest, lr=2e-3)]


OPTIMIZERS: dict[str, Make] = {
    "adamw foreach": one(AdamW, lr=2e-3, foreach=True),
    "adamw fused": one(AdamW, lr=2e-3, fused=True),
    "adamw amsgrad": one(AdamW, lr=2e-3, amsgrad=True),
    "adamw tensor lr": one(AdamW, lr=torch.tensor(2e-3), fused=True),
    "adam": one(Adam, lr=2e-3),
    "nadam": one(torch.optim.NAdam, lr=2e-3),
    "radam": one(torch.optim.RAdam, lr=4e-3),
    "adamax": one(torch.optim.Adamax, lr=4e-3),
    "adagrad": one(torch.optim.Adagrad, lr=1e-2),
    "adadelta": one(torch.optim.Adadelta, lr=1.0),
    "rmsprop": one(torch.optim.RMSprop, lr=1e-3),
    "rprop": one(torch.optim.Rprop, lr=1e-4),
    "adafactor": one(torch.optim.Adafactor, lr=1e-2),
    "adafactor, relative steps": one(
        transformers.optimization.Adafactor, relative_step=True, warmup_init=False, lr=None
    ),
    "sgd with momentum": one(SGD, lr=0.1, momentum=0.9),
    "sgd, nesterov": one(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "muon and adamw": partial(language, optimizers=muon_and_adamw),
    "layer-wise lrs": partial(language, optimizers=grouped),
    "optimi adamw": one(optimi.AdamW, lr=2e-3),
    "optimi stableadamw": one(optimi.StableAdamW, lr=2e-3),
}
# learning rates of pytorch-optimizer's: of its own examples or of the papers, for models of this size
FOREIGN = {
    "Lion": 3e-4, "Tiger": 1e-3, "SOAP": 3e-3, "AdEMAMix": 1e-3, "Prodigy": 1.0, "DAdaptAdam": 1.0, "Adan": 5e-3,
    "AdaBelief": 2e-3, "AdaBound": 2e-3, "AdaPNM": 2e-3, "AdamP": 2e-3, "AdaShift": 2e-3, "ADOPT": 2e-3, "Amos": 1e-2,
    "CAME": 1e-3, "DiffGrad": 2e-3, "Fromage": 1e-2, "Grams": 2e-3, "Kate": 1e-2, "LaProp": 1e-3, "Lamb": 1e-2, "MARS": 2e-3,
    "NovoGrad": 1e-2, "PNM": 0.05, "QHAdam": 2e-3, "Ranger21": 5e-3, "ScalableShampoo": 1e-3, "SignSGD": 3e-4, "SM3": 0.1,
    "SPlus": 0.1, "StableAdamW": 2e-3, "Yogi": 1e-2, "AdamMini": 2e-3, "AdaFactor": 1e-2, "Ranger": 5e-3, "EXAdam": 2e-3,
    "FOCUS": 1e-3, "Grokfast": 2e-3, "SimplifiedAdEMAMix": 1e-4, "StableSPAM": 2e-3, "APOLLO": 1e-2, "QGaLore": 2e-3,
}  # fmt: skip


def foreign(name: str, seed: int) -> Program:
    kind = getattr(pytorch_optimizer, name)
    extra = {"num_iterations": 100} if name == "Ranger21" else {}
    return language(seed, lambda model: kind(model.parameters(), lr=FOREIGN[name], **extra))


def schedule_free(seed: int) -> Program:
    def made(model: nn.Module) -> Optimizer:
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=5e-3, warmup_steps=10)
        optimizer.train()
        return optimizer

    return language(seed, made)


def sharpness_aware(seed: int) -> Program:
    """SAM: two passes an update (Foret et al. 2021)."""
    model, rows = TinyGPT(), Rows(seed, length=65)
    optimizer = pytorch_optimizer.SAM(model.parameters(), SGD, lr=0.1, momentum=0.9)

    def step(i: int) -> Tensor:
        ids = rows()
        loss = next_token(model, ids)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        next_token(model, ids).backward()
        optimizer.second_step(zero_grad=True)
        return loss.detach()

    return Program(model, [optimizer], step, (rows(), next_token))


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 60),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 4e-3, total_steps=61),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 20),
    "steps": lambda o: lr_scheduler.StepLR(o, 20, 0.5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 5e-4, 4e-3, step_size_up=15, cycle_momentum=False),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=10),
    "long warm-up": lambda o: lr_scheduler.LinearLR(o, 1e-3, total_iters=200),
    "warm-up, stable, decay": lambda o: transformers.get_wsd_schedule(o, 10, 20, num_training_steps=60),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 60),
}


def programs() -> Iterator[tuple[str, Make]]:
    yield from ((f"optimizer {name}", make) for name, make in OPTIMIZERS.items())
    yield from ((f"optimizer {name}, pytorch-optimizer", partial(foreign, name)) for name in FOREIGN)
    yield from ((f"schedule {name}", partial(language, schedule=schedule)) for name, schedule in SCHEDULES.items())
