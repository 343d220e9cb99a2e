"""A second judged set, from public threads: order of events, learning rates, size of the step, schedules on paper, data.

Written by one who had read neither the rules' code nor their tests, and committed before any watch was run on them. Each
row names a thread in which the fault was reported. Written as in detection_loops.py.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, lr_scheduler

from benchmarks.detection_bodies import (
    Batch,
    bandit,
    body,
    convolved,
    diffusion,
    gpt,
    language_model,
    picture_loss,
    t5,
)
from benchmarks.detection_bodies import resnet as resnet_body
from benchmarks.detection_data import DATA, changed
from benchmarks.detection_kinds import factorised, generative, gru, squares, wav2vec
from benchmarks.detection_loops import ORDER, SIZE
from benchmarks.detection_schedules import PAPER, RATES, on_paper
from benchmarks.detection_twins import Loop, Row, adamw, row
from benchmarks.healthy_senses import plain_cnn
from benchmarks.programs import Pictures, Program, text

ROWS: list[Row] = []


# ---- order of events -------------------------------------------------------------------------------------------------


@row(
    ROWS, ORDER, "GAN", "stale_gradients", plain=True
)  # Lightning-AI/pytorch-lightning#591, FoundationVision/OmniTokenizer#15
def leftovers_of_the_generator(seed: int, sick: bool) -> Program:
    """each optimizer clears after its own step: what the generator's pass leaves in the discriminator is stepped along"""
    return generative(seed, kept=sick)


@row(ROWS, ORDER, "GRU", "no_updates", "not_measured")  # Wangyixinxin/ACN#9, euancrabtree/Lipreading-PyTorch#7
def optimizer_in_the_loop(seed: int, sick: bool) -> Program:
    """Adam is made anew for each batch: another one than was watched steps, and it never has a past"""
    loop = Loop(gru(seed))
    loop.schedule = lambda i: None
    if sick:
        loop.step = lambda i: adamw(loop.body.model, loop.body.lr).step()
    return loop.program()


@row(ROWS, ORDER, "ResNet", "no_updates", "cleared_gradients", trigger=30)  # ClementPinard/SfmLearner-Pytorch#5
def either_step(seed: int, sick: bool) -> Program:
    """`if scheduler: scheduler.step() else: optimizer.step()`, and a scheduler is there from update 30 on"""
    loop = Loop(resnet_body(seed))
    decay = lr_scheduler.StepLR(loop.optimizers[0], 1000)

    def step(i: int) -> None:
        if i < 30 or not sick:
            Loop.step(loop, i)
        if i >= 30:
            decay.step()

    loop.step, loop.schedule = step, lambda i: None
    return loop.program()


# ---- learning rates over time ----------------------------------------------------------------------------------------


@row(ROWS, RATES, "OPT", "lr_too_low", "lr_spent", "lr_overwritten")  # pytorch/pytorch#78917, lhoyer/MIC#60
def rate_squared(seed: int, sick: bool) -> Program:
    """LambdaLR's function returns the rate and not a factor: 2e-3 of 2e-3"""
    loop = Loop(language_model("opt", seed))
    whole = loop.body.lr if sick else 1.0
    lambdas = lr_scheduler.LambdaLR(loop.optimizers[0], lambda i: whole * min(1.0, (i + 1) / 10))
    loop.schedule = lambda i: lambdas.step() if i else None
    return loop.program()


@row(ROWS, RATES, "GPT-NeoX", "lr_overwritten", "lr_too_high", trigger=5)  # Adit-Jain-srm/NightmareNet#158
def warm_up_without_end(seed: int, sick: bool) -> Program:
    """`step / warmup_steps` without a minimum: after a warm-up of 5 the rate goes on to rise, to 20 times its peak"""
    loop = Loop(language_model("gpt_neox", seed))
    lambdas = lr_scheduler.LambdaLR(loop.optimizers[0], lambda i: (i + 1) / 5 if sick else min(1.0, (i + 1) / 5))
    loop.schedule = lambda i: lambdas.step() if i else None
    return loop.program()


@row(ROWS, RATES, "Wav2Vec2", "lr_overwritten", "lr_spent", "lr_too_low", trigger=8)  # Vision-CAIR/MiniGPT-4#263
def warm_up_by_the_inner_counter(seed: int, sick: bool) -> Program:
    """a warm-up of 80 counts the steps within an epoch, and an epoch has 8: every eighth update it begins anew"""
    loop = Loop(wav2vec(seed))
    loop.warmup = 80
    loop.schedule = lambda i: Loop.schedule(loop, i % 8 if sick else i)
    return loop.program(budget=400)


# ---- size of the step that arrives -----------------------------------------------------------------------------------


@row(ROWS, SIZE, "Qwen2", "not_linear", "muon_convention")  # deepspeedai/DeepSpeed#7641, vllm-project/speculators#866
def muon_on_tables(seed: int, sick: bool) -> Program:
    """Muon is given every parameter with two dimensions, the token table and the head among them"""
    loop_body = language_model("qwen2", seed)
    model = loop_body.model
    hidden = [p for p in (model if sick else model.model.layers).parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return Loop(loop_body, [Muon(hidden, lr=0.02, weight_decay=0.0), AdamW(rest, lr=2e-3)]).program()


@row(ROWS, SIZE, "CNN", "starved_steps", "lr_too_low")  # huggingface/accelerate#3533, #1773
def divided_twice(seed: int, sick: bool) -> Program:
    """the loop divides the loss by 16 micro-batches, and the library that it calls does so, too; SGD"""
    loop_body = body(plain_cnn(), lambda s: Pictures(s, batch=4), seed, picture_loss)
    optimizer = SGD(loop_body.model.parameters(), lr=0.05, momentum=0.9)
    loop = Loop(loop_body, [optimizer], n_accum=16, clip=None)
    if sick:
        loop.forward = lambda model, batch: picture_loss(model, batch) / 16
    return loop.program()


@row(
    ROWS, SIZE, "policy", "starved_steps", "frozen_tensor", "cleared_gradients", plain=True
)  # strands-labs/robots#2028
def clipped_at_zero(seed: int, sick: bool) -> Program:
    """`max_grad_norm: 0` was meant as no clipping, and clips to nothing"""
    loop = Loop(bandit(seed))
    if sick:
        loop.clip = lambda i: nn.utils.clip_grad_norm_(loop.body.model.parameters(), 0.0)
    return loop.program()


# ---- targets and data ------------------------------------------------------------------------------------------------


@row(
    ROWS, DATA, "T5", "label_shift", "future_leak", plain=True
)  # lgw863/ACSA-generation#5, huggingface/transformers#7112
def decoder_sees_its_labels(seed: int, sick: bool) -> Program:
    """the labels themselves are given as the decoder's inputs, not shifted: each place holds its own answer"""
    return changed(t5(seed), sick, lambda batch: batch | {"decoder_input_ids": batch["labels"]})


@row(ROWS, DATA, "GPT-2", "one_text", "repeated_data")  # karpathy/build-nanogpt#22, iCog-Labs-Dev/PC-Transformers#134
def windows_one_byte_on(seed: int, sick: bool) -> Program:
    """windows begin one byte after each other and are not shuffled: a batch is one text eight times"""
    turn = iter(range(10**6))

    def change(batch: Batch) -> Batch:
        at = 200_000 * (seed + 1) + 8 * next(turn) + torch.arange(8)[:, None]
        return dict.fromkeys(batch, text()[at % (len(text()) - 64) + torch.arange(64)])

    return changed(language_model("gpt2", seed), sick, change)


@row(ROWS, DATA, "diffusion", "repeated_data", plain=True)  # huggingface/diffusers#175, verl-project/verl-omni#561
def same_noise(seed: int, sick: bool) -> Program:
    """the noise and the times come from a generator that is seeded in the step: they are those of the first, always"""
    return Loop(diffusion(seed, seeded=sick)).program()


@row(
    ROWS, DATA, "factors", "loss_not_falling", "shared_target", plain=True
)  # pytorch/pytorch#16045, LAMDA-Tabular/TALENT#92
def column_of_targets(seed: int, sick: bool) -> Program:
    """targets of shape (B, 1) beside outputs of shape (B,): each output is held against every target"""
    loop = Loop(factorised(seed))
    if sick:
        loop.forward = lambda model, batch: squares(model, batch, column=True)
    return loop.program()


# ---- schedules on paper ----------------------------------------------------------------------------------------------


@row(ROWS, PAPER, "convolutions", "schedule")  # huggingface/diffusers#4387
def decay_in_micro_batches(seed: int, sick: bool) -> Program:
    """the decay's length was multiplied by the accumulation: of a cosine over 8000 steps the 2000 see the first quarter"""
    return on_paper(seed, sick, convolved, decay_steps=8000)


@row(ROWS, PAPER, "GPT", "schedule")  # Vision-CAIR/MiniGPT-4#444
def least_above_most(seed: int, sick: bool) -> Program:
    """the least rate is ten times the highest: the decay is a rise"""
    return on_paper(seed, sick, gpt, min_lr_ratio=10.0)
