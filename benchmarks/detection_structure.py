"""Sick rows whose fault is beside the model: numbers outside the optimizer, structure. Written as in detection_loops.py."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.checkpoint import checkpoint

from benchmarks.detection_bodies import (
    bert,
    body,
    clip,
    cnn,
    diffusion,
    gpt,
    language_model,
    pair_loss,
    picture_loss,
    t5,
    vit,
)
from benchmarks.detection_kinds import generative
from benchmarks.detection_twins import Loop, Row, adamw, row
from benchmarks.programs import Pictures, Program

ROWS: list[Row] = []
NUMBERS, STRUCTURE = "numbers outside the optimizer", "structure"

# ---- numbers outside the optimizer -----------------------------------------------------------------------------------


@row(ROWS, NUMBERS, "GPT", "stuck_copy")
def average_in_16_bits(seed: int, sick: bool) -> Program:
    """an exponential average (0.999, corrected for its start) is kept in bfloat16"""
    loop = Loop(gpt(seed))
    model = loop.body.model
    ema = copy.deepcopy(model).requires_grad_(False)
    ema = ema.bfloat16() if sick else ema
    both = nn.ModuleDict({"model": model, "ema": ema})

    def step(i: int) -> Tensor:
        loss = loop.update(i)
        for p, q in zip(ema.parameters(), model.parameters(), strict=True):
            p.lerp_(q.detach().to(p.dtype), 1 - min(0.999, (1 + i) / (10 + i)) if i < 30 else 0.004)
        return loss

    def held_out() -> float:
        with torch.no_grad():
            whole = copy.deepcopy(ema).float().eval()
            return float(sum(pair_loss(whole, batch) for batch in loop.body.test) / len(loop.body.test))

    return Program(both, loop.optimizers, step, None, {"expect_frozen": ("ema.",)}, held_out)


@row(ROWS, NUMBERS, "Mamba", "delta_start", plain=True)
def blanket_init(seed: int, sick: bool) -> Program:
    """one init for all linear layers, biases to zero, after the model's own: the time steps start at 0.7"""
    loop = Loop(language_model("mamba", seed))
    if sick:
        for module in loop.body.model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return loop.program()


@row(ROWS, NUMBERS, "diffusion", "rough_positions")
def rough_times(seed: int, sick: bool) -> Program:
    """times are given to the network in whole thousandths through a table of sines in bfloat16"""
    body = diffusion(seed)
    body.model.register_buffer("table", sines().bfloat16() if sick else sines(), persistent=False)

    def told(model: nn.Module, batch: tuple) -> Tensor:
        return F.mse_loss(model(batch[0], model.table[(batch[1] * 999).long()].float()), batch[2])

    body.model.forward = partial(by_table, body.model)
    return Loop(body._replace(loss=told)).program()


def sines() -> Tensor:
    angles = torch.arange(1000)[:, None] / 1000 * torch.pi * 2.0 ** torch.arange(8) / 4  # (1000, 8)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


def by_table(model: nn.Module, x: Tensor, told: Tensor) -> Tensor:
    hidden = F.silu(model.inside(x) + model.shift(F.silu(model.time(told))))
    return model.outside(F.silu(model.middle(hidden)))


@row(ROWS, NUMBERS, "recomputed CNN", "counted_twice")
def counted_twice(seed: int, sick: bool) -> Program:
    """batch norm under recomputation: each batch enters the running statistics twice"""

    class Recomputed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False) if sick and self.training else super().forward(x)

    def norms(n: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(n, 32, 3, padding=1), nn.BatchNorm2d(32, momentum=0.02), nn.ReLU(), nn.MaxPool2d(2)
        )

    model = nn.Sequential(Recomputed(norms(1), norms(32)), nn.Flatten(), nn.Linear(32 * 36, 36))
    return Loop(body(model, lambda s: Pictures(s), seed, picture_loss)).program()


@row(ROWS, NUMBERS, "T5", "nonfinite_gradient", trigger=50, plain=True)
def hidden_nan(seed: int, sick: bool) -> Program:
    """from update 50 on now and then a gradient is NaN, clipping spreads it, and the log shows the last finite loss"""
    loop = Loop(t5(seed))

    def told(i: int) -> Tensor:
        loss = Loop.backward(loop, i)
        if sick and i in (50, 60):
            next(loop.body.model.decoder.parameters()).grad[0, 0] = float("nan")
        loop.shown = loss if loss.isfinite() else getattr(loop, "shown", loss)
        return loop.shown

    loop.backward = told
    return loop.program()


# ---- structure -------------------------------------------------------------------------------------------------------


@row(ROWS, STRUCTURE, "GPT", "broken_tie")
def untied_by_a_copy(seed: int, sick: bool) -> Program:
    """a head that shared its weight with the embedding got a copy of it"""
    loop_body = gpt(seed, tied=True)
    if sick:
        loop_body.model.head.weight = nn.Parameter(loop_body.model.embed.weight.detach().clone())
    return Loop(loop_body).program()


@row(ROWS, STRUCTURE, "ViT", "not_in_optimizer", plain=True)
def new_head(seed: int, sick: bool) -> Program:
    """the classifier is replaced after the optimizer was built"""
    loop = Loop(vit(seed))
    if sick:
        loop.body.model.classifier = nn.Linear(64, 10)
    return loop.program()


@row(ROWS, STRUCTURE, "Llama", "frozen_module", plain=True)
def frozen_by_a_substring(seed: int, sick: bool) -> Program:
    """all whose name holds a `1` are frozen, for layer 1 alone was meant: the second of two layers"""
    loop_body = language_model("llama", seed)
    for name, p in loop_body.model.named_parameters():
        p.requires_grad_(not sick or "1" not in name)
    return Loop(loop_body, [adamw(loop_body.model, loop_body.lr)]).program()


@row(ROWS, STRUCTURE, "GAN", "updated_twice", plain=True)
def two_owners(seed: int, sick: bool) -> Program:
    """the generator's optimizer holds the discriminator, too: it learns to be fooled"""
    return generative(seed, twice=sick)


@row(ROWS, STRUCTURE, "BERT", "not_in_optimizer", plain=True)
def hidden_in_a_list(seed: int, sick: bool) -> Program:
    """the layers are kept in a plain list: the model works, and its parameters() do not hold them"""
    loop_body = bert(seed)
    encoder = loop_body.model.bert.encoder
    if sick:
        layers = list(encoder.layer)
        del encoder.layer
        encoder.layer = layers
    return Loop(loop_body, [adamw(loop_body.model, loop_body.lr)]).program()


@row(ROWS, STRUCTURE, "CNN", "frozen_tensor", "not_in_optimizer", trigger=30, plain=True)
def best_weights_restored(seed: int, sick: bool) -> Program:
    """at update 30 the loop goes on with a copy of the model that it kept: the optimizer moves the old one"""
    loop = Loop(cnn(seed))

    def update(i: int) -> Tensor:
        if sick and i == 30:
            for module in loop.body.model.children():
                for name, p in list(module.named_parameters()):
                    setattr(module, name, nn.Parameter(p.detach().clone()))
        return Loop.update(loop, i)

    loop.update = update
    return loop.program()


@row(ROWS, STRUCTURE, "CLIP", "not_in_optimizer")
def towers_alone(seed: int, sick: bool) -> Program:
    """the optimizer is given the two towers, and not the projections and the temperature"""
    loop_body = clip(seed)
    model = loop_body.model
    some = [*model.vision_model.parameters(), *model.text_model.parameters()]
    return Loop(loop_body, [AdamW(some if sick else list(model.parameters()), lr=1e-3)]).program()
