"""Sick rows whose fault is in the loop: the order of events, the size of the step.

Each function makes a program of a seed, sick or healthy; the decorator says the class, the kind of model, and which rules would
name the cause. None of them re-enacts an incident that the rules were written with.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon

from benchmarks.detection_bodies import (
    bert,
    cnn,
    convolved,
    diffusion,
    gpt,
    language_model,
    resnet,
    rnn,
    t5,
    texts,
    vit,
    whisper,
)
from benchmarks.detection_twins import Loop, Row, adamw, row
from benchmarks.programs import Program

ROWS: list[Row] = []
ORDER, SIZE = "order of events", "size of the step"

# ---- order of events -------------------------------------------------------------------------------------------------


@row(ROWS, ORDER, "ViT", "stale_gradients", plain=True)
def cleared_by_another(seed: int, sick: bool) -> Program:
    """gradients are cleared on a rebuilt optimizer's predecessor, which holds copies"""
    loop = Loop(vit(seed))
    other = adamw(copy.deepcopy(loop.body.model), 1e-3)
    if sick:
        loop.clear = lambda i: other.zero_grad()
    return loop.program()


@row(ROWS, ORDER, "GPT", "stale_gradients", plain=True)
def cleared_seldom(seed: int, sick: bool) -> Program:
    """the condition of an accumulation of 8 was left around zero_grad, and every batch steps"""
    loop = Loop(gpt(seed))
    if sick:
        loop.clear = lambda i: Loop.clear(loop, i) if i % 8 == 0 else None
    return loop.program()


@row(ROWS, ORDER, "Mixtral", "cleared_gradients")
def cleared_between(seed: int, sick: bool) -> Program:
    """zero_grad stands inside the loop over 8 micro-batches: seven of eight are thrown away"""
    loop = Loop(language_model("mixtral", seed, partial(texts, batch=2)), n_accum=8)
    if sick:

        def backward(i: int) -> Tensor:
            loop.n_accum, total = 1, 0.0
            for _ in range(8):
                Loop.clear(loop, i)
                total = total + Loop.backward(loop, i) / 8
            return total

        loop.backward = backward
    return loop.program()


@row(ROWS, ORDER, "LSTM", "stale_gradients")
def two_steps(seed: int, sick: bool) -> Program:
    """the framework steps, and the script does too: two updates of each gradient"""
    loop = Loop(rnn(seed))
    if sick:
        loop.step = lambda i: [Loop.step(loop, i) for _ in range(2)]
    return loop.program()


@row(ROWS, ORDER, "T5", "no_updates", plain=True)
def never_steps(seed: int, sick: bool) -> Program:
    """`if step % accumulation == accumulation`: never true"""
    loop = Loop(t5(seed))
    if sick:
        loop.step = lambda i: Loop.step(loop, i) if i % 4 == 4 else None
    return loop.program()


@row(ROWS, ORDER, "Whisper", "no_updates", "nonfinite_loss", "nonfinite_gradient", plain=True)
def skipped_quietly(seed: int, sick: bool) -> Program:
    """a row without targets makes the mean NaN, and a guard skips each such update without a word"""
    loop = Loop(whisper(seed))
    if sick:

        def forward(model: nn.Module, batch: dict) -> Tensor:
            logits = model(**batch).logits
            each = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none").sum(1)
            n = (batch["labels"] >= 0).sum(1) * (torch.arange(len(each)) > 0)
            return (each * (n > 0) / n).mean()

        loop.forward = forward
        loop.step = lambda i: Loop.step(loop, i) if finite(loop) else None
    return loop.program()


def finite(loop: Loop) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in loop.body.model.parameters() if p.grad is not None)


@row(ROWS, ORDER, "convolutions", "cleared_gradients", trigger=40, plain=True)
def cleared_after_validation(seed: int, sick: bool) -> Program:
    """from update 40 on a validation between the backward pass and the step clears the gradients"""
    loop = Loop(convolved(seed))
    if sick:
        loop.clip = lambda i: Loop.clip(loop, i) if i < 40 else loop.body.model.zero_grad()
    return loop.program()


# ---- size of the step that arrives -----------------------------------------------------------------------------------


@row(ROWS, SIZE, "Llama", "muon_convention", "lr_too_low")
def muon_at_adams_rate(seed: int, sick: bool) -> Program:
    """Muon, whose steps have the RMS of an orthogonal matrix, at AdamW's 3e-4"""
    body = language_model("llama", seed)
    hidden = [p for p in body.model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in body.model.parameters() if all(p is not q for q in hidden)]
    return Loop(body, [Muon(hidden, lr=3e-4 if sick else 0.02, weight_decay=0.0), AdamW(rest, lr=2e-3)]).program()


@row(ROWS, SIZE, "BERT", "starved_steps")
def eps_too_large(seed: int, sick: bool) -> Program:
    """Adam's epsilon is 0.1, a hundred times the gradients: steps are a fraction of the rate"""
    body = bert(seed)
    return Loop(body, [adamw(body.model, body.lr, eps=0.1 if sick else 1e-8)]).program()


@row(ROWS, SIZE, "Mixtral", "starved_steps")
def unscaled_twice(seed: int, sick: bool) -> Program:
    """gradients are divided by a loss scale of 2^20 that the loss never had"""
    loop = Loop(language_model("mixtral", seed))
    if sick:

        def clip(i: int) -> None:
            for p in loop.body.model.parameters():
                if p.grad is not None:
                    p.grad /= 2.0**20
            Loop.clip(loop, i)

        loop.clip = clip
    return loop.program()


@row(ROWS, SIZE, "ResNet", "starved_steps", "lr_too_low")
def clipped_to_nothing(seed: int, sick: bool) -> Program:
    """SGD with the gradients clipped at 1e-3, a thousandth of their norm"""
    body = resnet(seed)
    return Loop(body, [SGD(body.model.parameters(), lr=0.05, momentum=0.9)], clip=1e-3 if sick else 1.0).program()


@row(ROWS, SIZE, "LSTM", "lr_too_high")
def hot(seed: int, sick: bool) -> Program:
    """Adam at 40 times a good rate"""
    body = rnn(seed)
    return Loop(body, [Adam(body.model.parameters(), lr=0.16 if sick else 4e-3)]).program()


@row(ROWS, SIZE, "Mamba", "lost_updates")
def rounded_away(seed: int, sick: bool) -> Program:
    """all parameters in bfloat16 at 3e-5, in the healthy twin float32"""
    body = language_model("mamba", seed)
    if sick:
        body.model.bfloat16()
    return Loop(body, [AdamW(body.model.parameters(), lr=3e-5, weight_decay=0.0)]).program()


@row(ROWS, SIZE, "diffusion", "lost_updates")
def half_precision(seed: int, sick: bool) -> Program:
    """a denoiser whose parameters were cast to bfloat16, with its usual 2e-4"""
    body = diffusion(seed)
    if sick:
        body.model.bfloat16()
        to = lambda batch: tuple(x.bfloat16() for x in batch)  # noqa: E731
        body = body._replace(loss=lambda model, batch: denoising(model, to(batch)))
    return Loop(body, [Adam(body.model.parameters(), lr=2e-4)]).program()


def denoising(model: nn.Module, batch: tuple) -> Tensor:
    return nn.functional.mse_loss(model(*batch[:2]).float(), batch[2].float())


@row(ROWS, SIZE, "CNN", "lr_too_low", "starved_steps")
def cold(seed: int, sick: bool) -> Program:
    """SGD at Adam's rate: 1e-4 in place of 0.05"""
    body = cnn(seed)
    return Loop(body, [SGD(body.model.parameters(), lr=1e-4 if sick else 0.05, momentum=0.9)]).program()
