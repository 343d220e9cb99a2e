"""A third judged set, from public threads: order of events, learning rates, size of the step, data, numbers, schedules
on paper.

Written, as the second, by one who had read neither the rules' code nor their tests; right causes and harm were committed before
any watch was run on it. Each row names a thread in which the fault was reported. Written as in detection_loops.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, lr_scheduler

from benchmarks.detection_bodies import (
    Batch,
    Body,
    body,
    cnn,
    convolved,
    diffusion,
    gpt,
    language_model,
    of_pairs,
    picture_loss,
    resnet,
    texts,
)
from benchmarks.detection_data import DATA, changed
from benchmarks.detection_kinds import wav2vec
from benchmarks.detection_loops import ORDER, SIZE
from benchmarks.detection_schedules import PAPER, RATES, on_paper
from benchmarks.detection_structure import NUMBERS
from benchmarks.detection_twins import Loop, Row, row
from benchmarks.healthy_kinds import Recurrent, mlp
from benchmarks.programs import Pictures, Program, glyphs

ROWS: list[Row] = []


# ---- order of events -------------------------------------------------------------------------------------------------


@row(ROWS, ORDER, "CNN", "stale_gradients")  # rollovd/LookSAM#3
def second_pass_on_top(seed: int, sick: bool) -> Program:
    """sharpness-aware minimisation without zero_grad before its second pass: the first one's gradient is stepped along, too"""
    loop_body = cnn(seed)
    loop = Loop(loop_body, [SGD(loop_body.model.parameters(), lr=0.05, momentum=0.9)], clip=None)

    def backward(i: int) -> Tensor:
        batch, parameters = loop.batch(), list(loop_body.model.parameters())
        loss = loop.forward(loop_body.model, batch)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        moves = [0.05 * p.grad / norm for p in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, moves)
        if not sick:
            loop.clear(i)
        loop.forward(loop_body.model, batch).backward()
        with torch.no_grad():
            torch._foreach_sub_(parameters, moves)
        return loss.detach()

    loop.backward = backward
    return loop.program()


@row(
    ROWS, ORDER, "RNN", "lr_too_high", "nonfinite_loss", "nonfinite_gradient"
)  # VGraphRNN/VGRNN#4, awslabs/graphstorm#1366
def clipped_after_the_step(seed: int, sick: bool) -> Program:
    """`clip_grad_norm_` stands after the step: what is clipped is cleared next, and the rate was chosen for clipped steps"""
    loop_body = of_pairs(Recurrent(nn.RNN), seed)
    loop = Loop(loop_body, [SGD(loop_body.model.parameters(), lr=4.0, momentum=0.9)], clip=0.1)
    if sick:
        loop.clip, loop.step = partial(Loop.step, loop), partial(Loop.clip, loop)
    return loop.program()


# ---- learning rates over time ----------------------------------------------------------------------------------------


@row(ROWS, RATES, "diffusion", "lr_too_low", "lr_spent", "lr_overwritten")  # ace-step/ACE-Step#198
def warm_up_by_the_epoch(seed: int, sick: bool) -> Program:
    """a warm-up of 20 steps is stepped once an epoch, the framework's default, and an epoch has 50 updates"""
    loop = Loop(diffusion(seed))
    loop.warmup = 20
    loop.schedule = lambda i: Loop.schedule(loop, i // 50 if sick else i)
    return loop.program(budget=400)


@row(ROWS, RATES, "segmentation", "lr_overwritten", "lr_spent", "schedule", trigger=10)  # ivadomed/ivadomed#57
def cosine_beyond_its_end(seed: int, sick: bool) -> Program:
    """a cosine over 10 epochs is stepped with each batch: the rate falls to zero and rises again, five times in 100 updates"""
    loop = Loop(segmentation(seed))
    cosine = lr_scheduler.CosineAnnealingLR(loop.optimizers[0], 10)
    loop.schedule = lambda i: cosine.step() if i and (sick or i % 10 == 0) else None
    return loop.program(budget=100)


# ---- size of the step that arrives -----------------------------------------------------------------------------------


@row(
    ROWS, SIZE, "ResNet", "lr_too_high", "initial_loss"
)  # paiml/aprender#2123, hirofumi0810/neural_sp#168, fastai/fastai#3023
def never_divided(seed: int, sick: bool) -> Program:
    """losses of 16 micro-batches are summed and not divided: under SGD the rate is 16 times what was meant"""
    loop_body = resnet(seed)._replace(batches=Pictures(seed, batch=4))
    loop = Loop(loop_body, [SGD(loop_body.model.parameters(), lr=0.1, momentum=0.9)], n_accum=16, clip=None)
    if sick:
        loop.forward = lambda model, batch: 16 * picture_loss(model, batch)
    return loop.program()


@row(
    ROWS, SIZE, "OPT", "token_weights", "starved_steps", "cleared_gradients"
)  # huggingface/transformers#1563, simchowitzlabpublic/nano-world-model#22
def clipped_while_adding(seed: int, sick: bool) -> Program:
    """gradients are clipped after each of 8 micro-batches: the sum so far shrinks again and again, and the last ones outweigh it"""
    loop = Loop(language_model("opt", seed, partial(texts, batch=2)), n_accum=8, clip=0.1)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        loop.clip(0)  # before the next pass, or after the last: the same
        return loop.body.loss(model, batch)

    if sick:
        loop.forward = forward
    return loop.program(examined=(loop.batch(), None))


# ---- targets and data ------------------------------------------------------------------------------------------------


@row(
    ROWS, DATA, "ResNet", "one_text", "loss_not_falling", plain=True
)  # Deci-AI/super-gradients#416, pytorch/vision#7818, zalandoresearch/fashion-mnist#5
def sorted_by_class(seed: int, sick: bool) -> Program:
    """pictures come in the order of their folders, unshuffled: three batches of one letter, then three of the next"""
    turn, noise = iter(range(10**6)), torch.Generator().manual_seed(seed)

    def change(batch: Batch) -> Batch:
        letter = next(turn) // 3 % 36
        fonts = torch.randint(len(glyphs()[0]) // 36, (len(batch[1]),), generator=noise)
        return (glyphs()[0][36 * fonts + letter] - 0.13) / 0.29, torch.full_like(batch[1], letter)

    return changed(resnet(seed), sick, change)


def segmentation(seed: int, flipped_alone: bool = False) -> Body:
    """Which points of noisy letters (B, 1, 24, 24) are ink. Letters are turned upside down or mirrored at random in training;
    `flipped_alone`: their masks are not."""

    def batches(at: int) -> Callable[[], Batch]:
        pictures, noise = Pictures(at), torch.Generator().manual_seed(at)

        def batch() -> Batch:
            shown = pictures()[0]
            axes = [axis for axis in (2, 3) if torch.rand((), generator=noise) < 0.5]
            mask = (shown if flipped_alone and at == seed else shown.flip(axes)) > 0.5
            return shown.flip(axes) + torch.randn(shown.shape, generator=noise), mask.float()

        return batch

    layers: list[nn.Module] = []
    for n_in, n_out in ((1, 16), (16, 16), (16, 1)):
        layers += [nn.Conv2d(n_in, n_out, 5, padding=2), nn.ReLU()]
    loss = lambda model, batch: F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])  # noqa: E731
    return body(nn.Sequential(*layers[:-1]), batches, seed, loss)


@row(
    ROWS, DATA, "segmentation", "loss_not_falling", plain=True
)  # albumentations-team/albumentations#1056, fastai/fastai#245
def masks_stay_upright(seed: int, sick: bool) -> Program:
    """pictures are flipped at random, and their masks are not"""
    return Loop(segmentation(seed, flipped_alone=sick)).program()


@row(
    ROWS, DATA, "Wav2Vec2", "repeated_data", plain=True
)  # huggingface/datasets#3423, espnet/espnet#2081, huggingface/finetrainers#394
def each_worker_reads_all(seed: int, sick: bool) -> Program:
    """four workers of an iterable data set read all of it each: every batch comes four times in a row"""
    kept: list[Batch] = []

    def change(batch: Batch) -> Batch:
        kept.append(batch)
        return kept[(len(kept) - 1) // 4]

    return changed(wav2vec(seed), sick, change)


@row(
    ROWS, DATA, "Mamba", "repeated_data", trigger=50, plain=True
)  # paiml/entrenar#294, hiyouga/EasyR1#57, KempnerInstitute/KempnerForge#51
def loader_begins_anew(seed: int, sick: bool) -> Program:
    """a resume at update 50 does not know where the loader was: the first 50 batches come once more, in the same order"""
    kept: list[Batch] = []

    def change(batch: Batch) -> Batch:
        kept.append(batch)
        n = len(kept) - 2  # update: the first batch is the one that is examined
        return kept[n - 49] if n >= 50 else batch

    return changed(language_model("mamba", seed), sick, change)


# ---- numbers outside the optimizer -----------------------------------------------------------------------------------


@row(
    ROWS, NUMBERS, "CNN", "stuck_copy", "mode_mismatch"
)  # CuriousAI/mean-teacher#9, LeeDoYup/FixMatch-pytorch#10, FlyreelAI/sesemi#36
def average_without_statistics(seed: int, sick: bool) -> Program:
    """an average of the weights follows the parameters alone: its batch norms keep the statistics of a fresh model"""
    loop = Loop(cnn(seed))
    model = loop.body.model
    ema = copy.deepcopy(model).requires_grad_(False).eval()

    def step(i: int) -> Tensor:
        loss = loop.update(i)
        for p, q in zip(ema.parameters(), model.parameters(), strict=True):
            p.lerp_(q.detach(), 0.1)
        for p, q in zip(ema.buffers(), model.buffers(), strict=True):
            p.copy_(p if sick else q)
        return loss

    both = nn.ModuleDict({"model": model, "ema": ema})
    held_out = loop.body._replace(model=ema).held_out
    return Program(both, loop.optimizers, step, None, {"expect_frozen": ("ema.",)}, held_out)


class Sets(nn.Module):
    """The greatest of up to 8 numbers: (B, 8, 1) and which are padding, (B, 8), to (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(1, 32), mlp(32, 32, 1)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        y = self.inside(x)
        y = y + self.attention(y, y, y, key_padding_mask=padded)[0]
        return self.outside((y * ~padded[..., None]).sum(1) / (~padded).sum(1, keepdim=True).clamp(min=1)).squeeze(1)


@row(
    ROWS, NUMBERS, "sets", "nonfinite_loss", "nonfinite_gradient", trigger=20
)  # pytorch/pytorch#41508, dmlc/dgl#2657, rwth-i6/returnn#1020
def nothing_to_look_at(seed: int, sick: bool) -> Program:
    """from update 20 on a batch holds an empty set: all of its places are masked, and a softmax over nothing is NaN"""

    def batches(seed: int) -> Callable[[], Batch]:
        noise, made = torch.Generator().manual_seed(seed + 1000), iter(range(10**6))

        def batch() -> Batch:
            x, n = torch.randn(64, 8, 1, generator=noise), torch.randint(1, 9, (64, 1), generator=noise)
            n[0] = 0 if sick and next(made) >= 20 else n[0]
            padded = torch.arange(8) >= n
            return x, padded, x.squeeze(-1).masked_fill(padded, -1e9).amax(1).clamp(min=-9.0)

        return batch

    loss = lambda model, batch: F.mse_loss(model(*batch[:2]), batch[2])  # noqa: E731
    return Loop(body(Sets(), batches, seed, loss)).program()


# ---- schedules on paper ----------------------------------------------------------------------------------------------


@row(ROWS, PAPER, "GPT", "schedule")  # huggingface/transformers#8910
def never_logs(seed: int, sick: bool) -> Program:
    """a loss is logged every 5000 of 2000 steps: «No log»"""
    return on_paper(seed, sick, gpt, log_interval=5000)


@row(ROWS, PAPER, "convolutions", "schedule")  # pytorch/torchtitan#938, NVIDIA-NeMo/Megatron-Bridge#2857
def decayed_before_warm(seed: int, sick: bool) -> Program:
    """the decay, cut for a short run, ends at step 80, and the warm-up of the long one at 100"""
    return on_paper(seed, sick, convolved, decay_steps=80)
