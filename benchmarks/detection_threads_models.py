"""The second judged set's other half: dead signal, experts, flow and modes, numbers, structure. See detection_threads.py."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from torch.optim import AdamW

from benchmarks.detection_bodies import (
    body,
    gpt,
    language_model,
    of_pairs,
    pair_loss,
    picture_loss,
    rnn,
    texts,
    vit,
)
from benchmarks.detection_kinds import (
    Dropped,
    ExpertChoice,
    Levelled,
    Logits,
    Normalised,
    Projected,
    Switch,
    adapted,
    graph,
    gru,
    quantised,
    switched,
    triplets,
)
from benchmarks.detection_models import EXPERTS, FLOW, SIGNAL, leaking
from benchmarks.detection_structure import NUMBERS, STRUCTURE
from benchmarks.detection_twins import Loop, Row, adamw, row
from benchmarks.healthy_families import small
from benchmarks.healthy_senses import plain_cnn
from benchmarks.programs import Pictures, Program, own_loss

ROWS: list[Row] = []


# ---- dead or missing signal ------------------------------------------------------------------------------------------


@row(ROWS, SIGNAL, "graph", "no_gradient", "no_updates", plain=True)  # isayev/ReLeaSE#39, brian6091/Dreambooth#23
def loss_wrapped_anew(seed: int, sick: bool) -> Program:
    """the loss is made from numbers again, and `requires_grad_()` silences the error: nothing hangs on it"""
    loop = Loop(graph(seed))
    if sick:
        loop.forward = lambda model, batch: picture_loss(model, batch).detach().requires_grad_()
    return loop.program()


@row(ROWS, SIGNAL, "VQ", "no_gradient", plain=True)  # showlab/Olaf-World#8
def book_untaught(seed: int, sick: bool) -> Program:
    """the code book's loss is taken from the straight-through output, in which the book is detached"""
    return Loop(quantised(seed, late=sick)).program()


@row(
    ROWS, SIGNAL, "adapters", "no_gradient", "faint_gradient"
)  # Lightning-AI/litgpt#1229, nvidia-cosmos/cosmos-predict2.5#15
def both_factors_zero(seed: int, sick: bool) -> Program:
    """a second init sets both factors of the adapters to zero: neither gets a gradient, ever"""
    loop_body, frozen = adapted(texts, seed)
    if sick:
        for name, p in loop_body.model.named_parameters():
            if "lora_" in name:
                nn.init.zeros_(p)
    return Loop(loop_body).program(expect_frozen=frozen)


@row(
    ROWS, SIGNAL, "GRU", "loss_not_falling", "faint_gradient", "squashed_twice", plain=True
)  # bkitano/llama-from-scratch#5
def softmax_twice(seed: int, sick: bool) -> Program:
    """the model ends in a softmax, and the cross-entropy makes another one"""
    loop = Loop(gru(seed))
    if sick:
        loop.forward = lambda model, batch: pair_loss(lambda ids: model(ids).softmax(-1), batch)
    return loop.program()


# ---- experts ---------------------------------------------------------------------------------------------------------


@row(
    ROWS, EXPERTS, "levelled switch", "collapsed_experts", "starved_experts"
)  # deepseek-ai/DeepSeek-V3#761, torchtitan#1246
def levels_never_move(seed: int, sick: bool) -> Program:
    """experts are balanced by a level in their choice, and nobody updates it"""
    return Loop(switched(seed, Levelled, rate=0.0 if sick else 0.02)).program()


@row(ROWS, EXPERTS, "expert choice", "future_leak")  # piotrpiekos/MoSA#3, allenai/OLMoE#46
def experts_choose_ahead(seed: int, sick: bool) -> Program:
    """experts choose their tokens from the whole text, in a language model: who is chosen depends on what comes later"""
    loop_body = switched(seed, ExpertChoice if sick else Switch)
    return leaking(loop_body, loop_body, sick)


@row(ROWS, EXPERTS, "Qwen2-MoE", "collapsed_experts", "starved_experts")  # huggingface/transformers#44242
def balance_off_by_default(seed: int, sick: bool) -> Program:
    """the balance loss is computed only if the router's logits are asked for, and nobody asks"""
    loop_body = language_model("qwen2_moe", seed)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return own_loss(model, batch | {"output_router_logits": model.training and not sick})

    return Loop(loop_body._replace(loss=loss)).program()


# ---- information flow and modes --------------------------------------------------------------------------------------


@row(
    ROWS, FLOW, "LSTM", "future_leak", plain=True
)  # pytorch/pytorch#1538, facebookresearch/fairseq#2449, salesforce/cove#10
def batch_for_time(seed: int, sick: bool) -> Program:
    """an LSTM that expects time first is given the batch first: it runs from text to text, and time stands still"""
    loop = Loop(rnn(seed))
    loop.body.model.cell.batch_first = not sick
    return loop.program()


@row(ROWS, FLOW, "BERT decoder", "future_leak")  # huggingface/transformers#12704
def no_decoder(seed: int, sick: bool) -> Program:
    """BERT as a language model without `is_decoder`: its attention sees both ways"""
    config = small("bert")
    config.is_decoder = not sick
    loop_body = of_pairs(Logits(transformers.BertLMHeadModel(config)), seed)
    return leaking(loop_body, loop_body, sick)


@row(ROWS, FLOW, "normed convolutions", "future_leak")  # PKU-YuanGroup/Open-Sora-Plan#526, Wan-Video/Wan2.1#294
def norm_over_time(seed: int, sick: bool) -> Program:
    """between causal convolutions stands a group norm, whose mean and variance are those of the whole text"""
    loop_body = of_pairs(Normalised(over_time=sick), seed)
    return leaking(loop_body, loop_body, sick)


@row(
    ROWS, FLOW, "CNN", "mode_mismatch", "evaluation_mode"
)  # delip/PyTorchNLPBook#28, rixwew/pytorch-fm#21, yangze0930/NTS-Net#14
def always_dropped(seed: int, sick: bool) -> Program:
    """`F.dropout(x, 0.5)` without `training=`: it drops in evaluation, too"""
    *layers, head = plain_cnn()
    model = nn.Sequential(*layers, Dropped() if sick else nn.Dropout(0.5), head)
    return Loop(body(model, lambda s: Pictures(s), seed, picture_loss)).program()


# ---- numbers outside the optimizer -----------------------------------------------------------------------------------


@row(ROWS, NUMBERS, "triplets", "nonfinite_gradient", "nonfinite_loss", trigger=20)  # adambielski/siamese-triplet#18
def root_at_zero(seed: int, sick: bool) -> Program:
    """distances are roots of sums of squares; from update 20 on a pair is one picture twice, and the root's slope infinite"""
    return Loop(triplets(seed, eps=0.0 if sick else 1e-8)).program()


@row(
    ROWS, NUMBERS, "GPT", "bf16_parameters", "nonfinite_loss", "nonfinite_gradient"
)  # afiaka87/glide-finetune#6, CambioML/pykoi#69
def eps_of_nothing(seed: int, sick: bool) -> Program:
    """parameters in float16, where Adam's epsilon of 1e-8 is zero: rows without a gradient become 0 / 0"""
    loop_body = gpt(seed)
    if sick:
        loop_body.model.half()
    return Loop(loop_body, [AdamW(loop_body.model.parameters(), lr=1e-3)]).program()


# ---- structure -------------------------------------------------------------------------------------------------------


@row(ROWS, STRUCTURE, "GPT", "not_in_optimizer")  # pytorch/pytorch#1291, graykode/nlp-tutorial#29
def layer_made_in_forward(seed: int, sick: bool) -> Program:
    """a projection is made in the forward pass: another one each time, which no optimizer knows"""
    loop_body = gpt(seed)
    loop_body.model.blocks.insert(1, Projected(fresh=sick))
    return Loop(loop_body).program()


@row(
    ROWS, STRUCTURE, "ViT", "not_in_optimizer", "frozen_module", trigger=30
)  # skorch-dev/skorch#261, fastai/fastai#2133
def thawed_outside(seed: int, sick: bool) -> Program:
    """the backbone is thawed at update 30, and the optimizer was made of what was trainable before"""
    loop_body = vit(seed)
    whole = [adamw(loop_body.model, loop_body.lr)]
    loop_body.model.vit.requires_grad_(False)
    loop = Loop(loop_body, [adamw(loop_body.model, loop_body.lr)] if sick else whole)

    def update(i: int) -> torch.Tensor:
        if i == 30:
            loop_body.model.vit.requires_grad_(True)
        return Loop.update(loop, i)

    loop.update = update
    return loop.program(expect_frozen=("vit.",))
