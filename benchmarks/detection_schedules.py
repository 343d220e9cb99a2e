"""Sick rows whose fault is in the learning rates over time, or in schedules on paper. Written as in detection_loops.py."""

from __future__ import annotations

import copy
from functools import partial

from torch import Tensor
from torch.optim import AdamW, lr_scheduler

from benchmarks.detection_bodies import (
    bandit,
    bert,
    cnn,
    convolved,
    gpt,
    language_model,
    rnn,
    t5,
    texts,
    vit,
)
from benchmarks.detection_twins import Loop, Row, row
from benchmarks.programs import Program

ROWS: list[Row] = []
RATES, PAPER = "LR over time", "schedules on paper"

# ---- learning rates over time ----------------------------------------------------------------------------------------


@row(ROWS, RATES, "Llama", "lr_spent")
def cosine_per_micro_batch(seed: int, sick: bool) -> Program:
    """a cosine over 100 updates that steps with each of 8 micro-batches: it is over at update 12"""
    loop = Loop(language_model("llama", seed, partial(texts, batch=2)), n_accum=8)
    cosine = lr_scheduler.CosineAnnealingLR(loop.optimizers[0], 100)

    def schedule(i: int) -> None:
        for _ in range(8 if sick and 0 < i <= 12 else 1 if not sick and i else 0):
            cosine.step()

    loop.schedule = schedule
    return loop.program(budget=100)


@row(ROWS, RATES, "BERT", "lr_spent", "lr_too_low")
def warm_up_in_samples(seed: int, sick: bool) -> Program:
    """a warm-up meant in samples counts updates: the rate never leaves the ground"""
    loop = Loop(bert(seed))
    loop.warmup = 20_000 if sick else 10
    return loop.program(budget=100)


@row(ROWS, RATES, "ViT", "lr_overwritten", trigger=30)
def one_rate_for_all(seed: int, sick: bool) -> Program:
    """from update 30 on a schedule writes the backbone's rate to the head's group, a hundredth of it"""
    body = vit(seed)
    head = [p for name, p in body.model.named_parameters() if "classifier" in name]
    rest = [p for name, p in body.model.named_parameters() if "classifier" not in name]
    loop = Loop(body, [AdamW([{"params": rest, "lr": 5e-5}, {"params": head, "lr": 5e-3}])])

    def schedule(i: int) -> None:
        Loop.schedule(loop, i)
        if sick and i >= 30:
            for group in loop.optimizers[0].param_groups:
                group["lr"] = 5e-5

    loop.schedule = schedule
    return loop.program()


@row(ROWS, RATES, "GPT", "lr_spent", "lr_overwritten", trigger=22)
def plateau_the_wrong_way(seed: int, sick: bool) -> Program:
    """ReduceLROnPlateau waits for a loss that rises: the rate is cut tenfold every few updates"""
    loop = Loop(gpt(seed))
    plateau = lr_scheduler.ReduceLROnPlateau(
        loop.optimizers[0], "max" if sick else "min", patience=20 if not sick else 10
    )
    loop.schedule = lambda i: None

    def step(i: int) -> None:
        Loop.step(loop, i)
        plateau.step(loop.told)

    loop.step = step
    loop.backward = lambda i: keep_told(loop, i)
    return loop.program(budget=400)


def keep_told(loop: Loop, i: int) -> Tensor:
    loop.told = Loop.backward(loop, i)
    return loop.told


@row(ROWS, RATES, "CNN", "lr_spent", trigger=20)
def decay_per_update(seed: int, sick: bool) -> Program:
    """a decay of 0.8 an epoch is applied after every update"""
    loop = Loop(cnn(seed), clip=None)
    decay = lr_scheduler.ExponentialLR(loop.optimizers[0], 0.8)
    loop.schedule = lambda i: decay.step() if i and (sick or i % 50 == 0) else None
    return loop.program(budget=400)


@row(ROWS, RATES, "policy", "lr_overwritten", "lr_too_high", trigger=50)
def resumed_hot(seed: int, sick: bool) -> Program:
    """a resume at update 50 brings back the optimizer of another run, with a rate 100 times as high"""
    loop = Loop(bandit(seed))
    loop.schedule = lambda i: None

    def update(i: int) -> Tensor:
        if i == 50:
            state = copy.deepcopy(loop.optimizers[0].state_dict())
            for group in state["param_groups"]:
                group["lr"] *= 100 if sick else 1
            loop.optimizers[0].load_state_dict(state)
        return Loop.update(loop, i)

    loop.update = update
    return loop.program()


@row(ROWS, RATES, "T5", "lr_overwritten", "lr_spent", trigger=40)
def restored_warm_up(seed: int, sick: bool) -> Program:
    """at update 40 a restored scheduler writes the first rate of the warm-up, and is never stepped again"""
    loop = Loop(t5(seed))
    loop.schedule = lambda i: Loop.schedule(loop, 0 if sick and i >= 40 else i)
    loop.warmup = 20
    return loop.program(budget=400)


# ---- schedules on paper ----------------------------------------------------------------------------------------------


def on_paper(seed: int, sick: bool, body=gpt, **changes) -> Program:
    """The training is well; the config that goes with it is not."""
    paper = {
        "steps": 2000,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 100,
        "log_interval": 10,
        "save_interval": 500,
    }
    paper |= {"eval_interval": 100, "max_lr": 2e-3, "min_lr_ratio": 0.1, "decay_steps": 2000}
    program = Loop(body(seed)).program()
    return program._replace(config={"training": paper | (changes if sick else {})})


@row(ROWS, PAPER, "GPT", "schedule")
def never_saves(seed: int, sick: bool) -> Program:
    """a save interval beyond the last step"""
    return on_paper(seed, sick, save_interval=5000)


@row(ROWS, PAPER, "LSTM", "schedule")
def warm_up_beyond(seed: int, sick: bool) -> Program:
    """a warm-up longer than the training"""
    return on_paper(seed, sick, rnn, warmup_steps=4000)


@row(ROWS, PAPER, "convolutions", "schedule")
def never_evaluates(seed: int, sick: bool) -> Program:
    """evaluations every 3000 of 2000 steps"""
    return on_paper(seed, sick, convolved, eval_interval=3000)


@row(ROWS, PAPER, "GPT", "schedule")
def decays_early(seed: int, sick: bool) -> Program:
    """a decay over a tenth of the steps"""
    return on_paper(seed, sick, decay_steps=200)
