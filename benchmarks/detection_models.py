"""Sick rows whose fault is in the model: dead signal, experts, information flow and modes. Written as in detection_loops.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.detection_bodies import (
    Body,
    bandit,
    bert,
    clip,
    cnn,
    convolved,
    gpt,
    language_model,
    pair_loss,
    resnet,
    rnn,
    t5,
    vit,
    whisper,
)
from benchmarks.detection_kinds import generative, switched
from benchmarks.detection_twins import Loop, Row, row
from benchmarks.programs import Program

ROWS: list[Row] = []
SIGNAL, EXPERTS, FLOW = "dead or missing signal", "experts", "information flow and modes"


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
