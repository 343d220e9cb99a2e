"""Sick rows whose fault is in the model or beside it: dead signal, experts, information flow and modes, numbers outside the
optimizer, structure. How rows are written: detection_loops.py.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.utils.checkpoint import checkpoint

from benchmarks.detection_bodies import (
    Body,
    Loop,
    Row,
    adamw,
    bandit,
    bert,
    body,
    clip,
    cnn,
    convolved,
    diffusion,
    gpt,
    language_model,
    of_pairs,
    pair_loss,
    picture_loss,
    resnet,
    rnn,
    row,
    t5,
    vit,
    whisper,
)
from benchmarks.healthy_kinds import mlp
from benchmarks.programs import Pictures, Program

ROWS: list[Row] = []
SIGNAL, EXPERTS, FLOW = "dead or missing signal", "experts", "information flow and modes"
NUMBERS, STRUCTURE = "numbers outside the optimizer", "structure"


def detach(module: nn.Module) -> None:
    """What it returns carries no gradient."""

    def cut(module: nn.Module, args: tuple, output):
        if isinstance(output, Tensor):
            return output.detach()
        if hasattr(output, "last_hidden_state"):
            output.last_hidden_state = output.last_hidden_state.detach()
            return output
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in output)

    module.register_forward_hook(cut)


# ---- dead or missing signal ------------------------------------------------------------------------------------------


@row(ROWS, SIGNAL, "ViT", "no_gradient", plain=True)
def patches_without_gradient(seed: int, sick: bool) -> Program:
    """the patch embedding runs as preprocessing, under no_grad"""
    loop = Loop(vit(seed))
    if sick:
        detach(loop.body.model.vit.embeddings.patch_embeddings)
    return loop.program()


@row(ROWS, SIGNAL, "Whisper", "no_gradient", plain=True)
def deaf(seed: int, sick: bool) -> Program:
    """the encoder's states are detached before the decoder sees them"""
    loop = Loop(whisper(seed))
    if sick:
        detach(loop.body.model.model.encoder)
    return loop.program()


@row(ROWS, SIGNAL, "CLIP", "no_gradient", plain=True)
def one_tower(seed: int, sick: bool) -> Program:
    """the text tower is used through features that were computed without a graph"""
    loop = Loop(clip(seed))
    if sick:
        detach(loop.body.model.text_projection)
    return loop.program()


@row(ROWS, SIGNAL, "GAN", "no_gradient", plain=True)
def generator_cut_off(seed: int, sick: bool) -> Program:
    """the generator's loss is computed on the detached pictures that were made for the discriminator"""
    return generative(seed, sick)


def generative(seed: int, cut: bool = False, twice: bool = False) -> Program:
    """A GAN on glyphs whose discriminator's training begins anew with each program."""
    pictures, noise = Pictures(seed, size=12), torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({"g": mlp(16, 128, 144), "d": mlp(144, 128, 1, act=nn.LeakyReLU)})
    made = [*model["g"].parameters(), *(model["d"].parameters() if twice else ())]
    og, od = (Adam(p, lr=5e-4, betas=(0.5, 0.999)) for p in (made, model["d"].parameters()))

    def update(i: int) -> Tensor:
        real = pictures()[0].flatten(1)
        fake = model["g"](torch.randn(len(real), 16, generator=noise))
        loss = F.softplus(-model["d"](real)).mean() + F.softplus(model["d"](fake.detach())).mean()
        od.zero_grad()
        loss.backward()
        od.step()
        og.zero_grad()
        F.softplus(-model["d"](fake.detach() if cut else fake)).mean().backward()
        og.step()
        return loss.detach()

    def held_out() -> float:
        """How far the mean and the spread of what is generated are from the pictures'."""
        with torch.no_grad():
            fake = model["g"](torch.randn(1024, 16, generator=torch.Generator().manual_seed(7)))
        real = Pictures(12345, batch=1024, size=12)()[0].flatten(1)
        return float((fake.mean(0) - real.mean(0)).square().mean() + (fake.std(0) - real.std(0)).square().mean())

    return Program(model, [og, od], update, held_out=held_out)


@row(ROWS, SIGNAL, "BERT", "no_gradient", "faint_gradient")
def dead_units(seed: int, sick: bool) -> Program:
    """the feed-forward units start below zero everywhere, and their ReLU passes nothing"""
    loop = Loop(bert(seed))
    for layer in loop.body.model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
        if sick:
            nn.init.constant_(layer.intermediate.dense.bias, -10.0)
    return loop.program()


@row(ROWS, SIGNAL, "Llama", "faint_gradient", "no_gradient", plain=True)
def closed_gates(seed: int, sick: bool) -> Program:
    """attention is multiplied by a constant gate of 1e-7, as a layer scale that was never opened"""
    loop = Loop(language_model("llama", seed))
    if sick:
        for layer in loop.body.model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: 1e-7 * output)
    return loop.program()


@row(ROWS, SIGNAL, "policy", "no_gradient", plain=True)
def wrong_head(seed: int, sick: bool) -> Program:
    """the last hidden layer is read out through `.data`"""
    loop = Loop(bandit(seed))
    if sick:
        detach(loop.body.model[3])
    return loop.program()


@row(ROWS, SIGNAL, "Mamba", "no_gradient", plain=True)
def cut_from_the_middle(seed: int, sick: bool) -> Program:
    """from update 0 the second block sees a detached copy of the first one's output"""
    loop = Loop(language_model("mamba", seed))
    if sick:
        detach(loop.body.model.backbone.layers[0])
    return loop.program()


# ---- experts ---------------------------------------------------------------------------------------------------------


class Switch(nn.Module):
    """A feed-forward layer of 8 experts, the best one a token (Fedus et al. 2021), between an embedding and a head."""

    def __init__(self, weighed: bool = True, biased: bool = False, balance: float = 0.01):
        super().__init__()
        self.embed, self.head, self.cell = nn.Embedding(256, 64), nn.Linear(64, 256), nn.GRU(64, 64, batch_first=True)
        self.router, self.experts = nn.Linear(64, 8, bias=biased), nn.ModuleList(mlp(64, 64, 64) for _ in range(8))
        self.weighed, self.balance, self.auxiliary = weighed, balance, 0.0
        if biased:
            nn.init.constant_(self.router.bias[:1].data, 8.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.cell(self.embed(ids))[0]
        shares = self.router(x).softmax(-1)  # (B, T, 8)
        weights, chosen = shares.max(-1)
        load = F.one_hot(chosen, 8).float().mean((0, 1))
        self.auxiliary = self.balance * 8 * (load * shares.mean((0, 1))).sum()
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = chosen == e
            y[mine] = expert(x[mine]) * (weights[mine][:, None] if self.weighed else 1.0)
        return self.head(x + y)


def switched(seed: int, **model) -> Body:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return pair_loss(model, batch) + (model.auxiliary if model.training else 0.0)

    return of_pairs(Switch(**model), seed)._replace(loss=loss)


@row(ROWS, EXPERTS, "switch", "no_gradient", plain=True)
def untaught_router(seed: int, sick: bool) -> Program:
    """the chosen expert's output is not multiplied by the router's probability, and there is no balance loss"""
    return Loop(switched(seed, weighed=not sick, balance=0.0 if sick else 0.01)).program()


@row(ROWS, EXPERTS, "switch", "collapsed_experts", "starved_experts", plain=True)
def one_for_all(seed: int, sick: bool) -> Program:
    """a bias of 8 on the first expert, and no balance loss"""
    return Loop(switched(seed, biased=sick, balance=0.0 if sick else 0.01)).program()


@row(ROWS, EXPERTS, "switch", "collapsed_experts", "starved_experts", plain=True)
def unbalanced_on_purpose(seed: int, sick: bool) -> Program:
    """the balance loss has the wrong sign"""
    return Loop(switched(seed, balance=-0.5 if sick else 0.01)).program()


@row(ROWS, EXPERTS, "Mixtral", "collapsed_experts", "starved_experts")
def routers_start_large(seed: int, sick: bool) -> Program:
    """the router's weights were drawn a hundred times too large along one direction that all tokens share"""
    loop = Loop(language_model("mixtral", seed))
    if sick:
        model = loop.body.model
        with torch.no_grad():
            model.model.embed_tokens.weight += 0.05
            for layer in model.model.layers:
                layer.mlp.gate.weight[:2] += 0.5
                layer.mlp.gate.weight.requires_grad_(True)
    return loop.program()


# ---- information flow and modes --------------------------------------------------------------------------------------


@row(ROWS, FLOW, "LSTM", "future_leak")
def both_ways(seed: int, sick: bool) -> Program:
    """a language model whose LSTM is bidirectional"""
    return leaking(rnn(seed), rnn(seed, bidirectional=True), sick)


def leaking(well: Body, ill: Body, sick: bool) -> Program:
    """Held out: what the model says when it cannot see ahead, one token at a time, at the last place of a prefix."""
    loop = Loop(ill if sick else well)

    def held_out() -> float:
        model = loop.body.model.eval()
        with torch.no_grad():
            told = [pair_loss(lambda ids: model(ids)[:, -1:], (ids[:, :t], labels[:, t - 1 : t]))
                    for ids, labels in loop.body.test for t in (20, 40, 60)]  # fmt: skip
        model.train()
        return float(sum(told) / len(told))

    return loop.program(held_out)


@row(ROWS, FLOW, "convolutions", "future_leak")
def centred_kernels(seed: int, sick: bool) -> Program:
    """kernels over time that are centred in place of causal"""
    return leaking(convolved(seed), convolved(seed, ahead=2), sick)


@row(ROWS, FLOW, "CNN", "evaluation_mode", trigger=5, plain=True)
def left_in_evaluation(seed: int, sick: bool) -> Program:
    """a validation at update 5 leaves the model in evaluation mode: batch norm's statistics stay young"""
    loop = Loop(cnn(seed))

    def update(i: int) -> Tensor:
        if i == 5 and sick:
            loop.body.model.eval()
        return Loop.update(loop, i)

    loop.update = update
    return loop.program()


@row(ROWS, FLOW, "T5", "evaluation_mode", plain=True)
def never_in_training(seed: int, sick: bool) -> Program:
    """a model from from_pretrained is in evaluation mode, and nobody calls train(): its dropout never acts"""
    loop = Loop(t5(seed))
    if sick:
        loop.body.model.eval()
    return loop.program()


@row(ROWS, FLOW, "GPT", "scaled_copies", plain=True)
def skips_twice(seed: int, sick: bool) -> Program:
    """each block adds its input a second time: the stream doubles from block to block"""
    loop = Loop(gpt(seed))
    if sick:
        for block in loop.body.model.blocks:
            block.register_forward_hook(lambda module, args, output: output + args[0])
    return loop.program()


@row(ROWS, FLOW, "ResNet", "mode_mismatch", "evaluation_mode", plain=True)
def frozen_statistics(seed: int, sick: bool) -> Program:
    """batch norm keeps a momentum of 1e-4: in evaluation it uses the statistics of a fresh model"""
    loop = Loop(resnet(seed))
    if sick:
        for module in loop.body.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1e-4
    return loop.program()


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
    return Loop(body(model, lambda s: Pictures(s), seed, picture_loss, is_examined=False)).program()


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
