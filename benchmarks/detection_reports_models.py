"""The third judged set's other half: dead signal, experts, flow and modes, structure. See detection_reports.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from benchmarks.detection_bodies import (
    Batch,
    Body,
    bandit,
    bert,
    body,
    gpt,
    language_model,
    pair_loss,
    texts,
    vit,
)
from benchmarks.detection_kinds import adapted, factorised, switched
from benchmarks.detection_models import EXPERTS, FLOW, SIGNAL, leaking
from benchmarks.detection_structure import STRUCTURE
from benchmarks.detection_twins import Loop, Row, adamw, row
from benchmarks.healthy_families import small
from benchmarks.healthy_kinds import mlp
from benchmarks.programs import Pictures, Program

ROWS: list[Row] = []


def flat(seed: int) -> Callable[[], Tensor]:
    """Glyphs, (B, 144)."""
    pictures = Pictures(seed, size=12)
    return lambda: pictures()[0].flatten(1)


def table(target: Callable[[Tensor], Tensor]) -> Callable[[int], Callable[[], Batch]]:
    """Ten columns of noise (B, 10), and what is to be told of them, (B,)."""

    def batches(seed: int) -> Callable[[], Batch]:
        noise = torch.Generator().manual_seed(seed + 1000)

        def batch() -> Batch:
            x = torch.randn(64, 10, generator=noise)
            return x, target(x)

        return batch

    return batches


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]).squeeze(-1), batch[1])


# ---- dead or missing signal ------------------------------------------------------------------------------------------


class Rounded(nn.Module):
    """Glyphs through 32 bits. `through`: gradients pass the rounding as if it were not there (Bengio et al. 2013)."""

    def __init__(self, through: bool):
        super().__init__()
        self.encode, self.decode, self.through = mlp(144, 128, 32), mlp(32, 128, 144), through

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).sigmoid()
        return self.decode(z + (z.round() - z).detach() if self.through else z.round())


@row(ROWS, SIGNAL, "autoencoder", "no_gradient")  # Justin-Tan/generative-compression#27, NVlabs/sionna#699
def rounding_stops_it(seed: int, sick: bool) -> Program:
    """codes are rounded, and no gradient passes a rounding: the encoder stays as it was drawn"""
    loss = lambda model, x: F.mse_loss(model(x), x)  # noqa: E731
    return Loop(body(Rounded(through=not sick), flat, seed, loss)).program()


@row(
    ROWS, SIGNAL, "policy", "no_gradient", "constant_term", "starved_steps"
)  # huggingface/trl#3857, jsboige/CoursIA#10603
def alone_in_its_group(seed: int, sick: bool) -> Program:
    """rewards are compared within a group of answers to one question, and each group has but one: all advantages are zero"""
    worth, n = torch.randn(8, 4, generator=torch.Generator().manual_seed(7)), 1 if sick else 8

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x = batch[0][: 64 // n].repeat_interleave(n, 0)
        told = model(x).log_softmax(1)
        action = (told.detach().exp().cumsum(1) < batch[1]).sum(1, keepdim=True).clamp(max=3)
        gained = (x @ worth).gather(1, action).view(-1, n)
        advantage = (gained - gained.mean(1, keepdim=True)) / (gained.std(1, keepdim=True, correction=0) + 1e-4)
        return -(told.gather(1, action).view(-1, n) * advantage).mean()

    loop = Loop(bandit(seed))
    loop.forward = loss
    return loop.program()


@row(
    ROWS, SIGNAL, "ViT", "initial_loss", "loss_not_falling", "out_of_range", plain=True
)  # AnubhavGupta3377/Text-Classification-Models-Pytorch#9, tkipf/pygcn#16
def likelihood_without_log(seed: int, sick: bool) -> Program:
    """the negative log-likelihood is given probabilities in place of their logarithms: the loss is negative"""
    loop = Loop(vit(seed))
    if sick:
        loop.forward = lambda model, batch: F.nll_loss(model(batch[0]).logits.softmax(1), batch[1])
    return loop.program()


@row(
    ROWS, SIGNAL, "tabular", "no_gradient", "loss_not_falling", "out_of_range"
)  # ProteomicsML/ProteomicsML#203, ithemal/Ithemal#13, jcjohnson/pytorch-examples#30
def nothing_below_zero(seed: int, sick: bool) -> Program:
    """a ReLU follows the last layer of a regression, and half of the targets are negative"""
    layers = [*mlp(10, 64, 64, 1), *([nn.ReLU()] if sick else [])]
    target = lambda x: (x[:, 0] * x[:, 1] + x[:, 2] - x[:, 3].abs() + 0.8) / 1.5  # noqa: E731
    return Loop(body(nn.Sequential(*layers), table(target), seed, squared)).program()


class Variational(nn.Module):
    """Glyphs (B, 144) through 8 normal variables (Kingma & Welling 2014): what is shown, and the divergence from the prior, (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = mlp(144, 128, 16), mlp(8, 128, 144)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        shown = self.decode(mean + (log_var / 2).exp() * torch.randn_like(mean))
        return shown, 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)


@row(
    ROWS, SIGNAL, "VAE", "faint_gradient", "no_gradient"
)  # zdebruine/MMVAE#19, keras-team/keras#3383, AppliedDataSciencePartners/WorldModels#12
def mean_against_sum(seed: int, sick: bool) -> Program:
    """the reconstruction's error is a mean over the pixels, the divergence a sum: it drowns the other, and the code says nothing"""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        shown, divergence = model(x)
        return (shown - x).square().sum(1).mean() + divergence.mean()

    def uneven(model: nn.Module, x: Tensor) -> Tensor:
        shown, divergence = model(x)
        return F.mse_loss(shown, x) + divergence.mean()

    loop = Loop(body(Variational(), flat, seed, loss))
    if sick:
        loop.forward = uneven
    return loop.program()


# ---- experts ---------------------------------------------------------------------------------------------------------


@row(
    ROWS, EXPERTS, "Qwen2-MoE", "no_gradient", "faint_gradient"
)  # jingyaogong/minimind#858, davidmrau/mixture-of-experts#27
def weight_of_the_only_one(seed: int, sick: bool) -> Program:
    """one expert a token, and its weight is divided by the sum of the chosen ones' weights: it is 1, and the router learns nothing"""
    config = small("qwen2_moe")
    config.num_experts_per_tok, config.norm_topk_prob, config.output_router_logits = 1, sick, False
    return Loop(body(transformers.AutoModelForCausalLM.from_config(config), texts, seed)).program()


@row(
    ROWS, EXPERTS, "switch", "collapsed_experts", "starved_experts", "constant_term", plain=True
)  # NVIDIA-NeMo/Automodel#1408, yushuiwx/Mixture-of-LoRA-Experts#8
def balance_without_gradient(seed: int, sick: bool) -> Program:
    """the balance loss is added to the loss, and its gradient never reaches the router"""
    loop = Loop(switched(seed))
    if sick:
        loop.forward = lambda model, batch: pair_loss(model, batch) + model.auxiliary.detach()
    return loop.program()


# ---- information flow and modes --------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Attention in four heads by hand, called as nn.MultiheadAttention is. `mask`, `batch` and `merge` are its faults."""

    def __init__(self, fault: str):
        super().__init__()
        self.fault, self.qkv, self.out = fault, nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: Tensor, *_, **__) -> tuple[Tensor]:
        n, t, d = x.shape
        q, k, v = (part.view(n, t, 4, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        all_pairs = torch.ones(t, t, dtype=torch.bool)
        hidden = all_pairs.tril(-1) if self.fault == "mask" else all_pairs.triu(1)
        scores = (q @ k.mT / 4).masked_fill(hidden, -1e9)
        y = scores.softmax(0 if self.fault == "batch" else -1) @ v
        return (self.out((y if self.fault == "merge" else y.transpose(1, 2)).reshape(n, t, d)),)


def headed(seed: int, sick: bool, fault: str) -> Program:
    loop_body = gpt(seed)
    for block in loop_body.model.blocks:
        block.attention = Heads(fault if sick else "")
    return leaking(loop_body, loop_body, sick)


@row(ROWS, FLOW, "GPT", "future_leak")  # rasbt/LLMs-from-scratch#1061, pytorch/pytorch#27968
def mask_the_other_way(seed: int, sick: bool) -> Program:
    """one function's mask says what is hidden, the other's what is seen: each token attends to itself and to what follows"""
    return headed(seed, sick, "mask")


@row(ROWS, FLOW, "GPT", "future_leak")  # PetrochukM/PyTorch-NLP#2, ethanfetaya/NRI#25
def softmax_over_the_batch(seed: int, sick: bool) -> Program:
    """the softmax of the attention runs over the batch and not over the places: texts share what each may look at"""
    return headed(seed, sick, "batch")


@row(ROWS, FLOW, "GPT", "future_leak")  # jsbaan/transformer-from-scratch#4, ajhalthor/Transformer-Neural-Network#8
def heads_merged_unturned(seed: int, sick: bool) -> Program:
    """heads are merged by a reshape without the transpose: a place gets pieces of four other places of one head"""
    return headed(seed, sick, "merge")


@row(
    ROWS, FLOW, "BERT", "mode_mismatch", "loss_not_falling", plain=True
)  # hassony2/kinetics_i3d_pytorch#6, piergiaj/pytorch-i3d#58
def kept_for_dropped(seed: int, sick: bool) -> Program:
    """the share to keep, 0.9, is given as the share to drop"""
    loop = Loop(bert(seed))
    for module in loop.body.model.modules():
        if sick and isinstance(module, nn.Dropout):
            module.p = 0.9
    return loop.program()


# ---- structure -------------------------------------------------------------------------------------------------------


@row(ROWS, STRUCTURE, "factors", "frozen_module")  # RUCAIBox/RecBole#2046, huggingface/optimum-graphcore#304
def frozen_by_default(seed: int, sick: bool) -> Program:
    """`Embedding.from_pretrained` freezes unless it is told otherwise: the items' vectors stay as they came"""
    loop_body = factorised(seed)
    items = loop_body.model.items.weight.detach()
    loop_body.model.items = nn.Embedding.from_pretrained(items, **({} if sick else {"freeze": False}))
    return Loop(loop_body).program()


class Machine(nn.Module):
    """A factorisation machine (Rendle 2010): (B, 10) to (B,). `moved`: its factors are moved after they were made a parameter."""

    def __init__(self, moved: bool):
        super().__init__()
        self.linear, factors = nn.Linear(10, 1), nn.Parameter(0.1 * torch.randn(10, 8))
        self.factors = factors.to(torch.float32, copy=True) if moved else factors

    def forward(self, x: Tensor) -> Tensor:
        pairs = (x @ self.factors).square() - x.square() @ self.factors.square()
        return self.linear(x).squeeze(1) + 0.5 * pairs.sum(1)


@row(
    ROWS, STRUCTURE, "factorisation machine", "not_in_optimizer"
)  # pytorch/pytorch#20089, pytorch/pytorch#17484, pytorch/pytorch#94828
def moved_and_lost(seed: int, sick: bool) -> Program:
    """`nn.Parameter(…).to(…)` is no parameter: the factors are in no list, and stay as they were drawn"""
    target = lambda x: x[:, 0] + 2 * x[:, 1] * x[:, 2] - 2 * x[:, 3] * x[:, 4]  # noqa: E731
    return Loop(body(Machine(moved=sick), table(target), seed, squared, lr=2e-2)).program()


@row(ROWS, STRUCTURE, "adapters", "frozen_module")  # huggingface/peft#282, huggingface/trl#3926, tloen/alpaca-lora#352
def adapters_for_inference(seed: int, sick: bool) -> Program:
    """adapters are loaded for inference, frozen, as is the default: the head, trained beside them, learns alone"""
    loop_body, frozen = adapted(texts, seed)
    for name, p in loop_body.model.named_parameters():
        p.requires_grad_(p.requires_grad and not (sick and "lora_" in name) or "lm_head" in name)
    loop_body = loop_body._replace(lr=2e-3)
    return Loop(loop_body).program(expect_frozen=tuple(name for name in frozen if "lm_head" not in name))


def margin(seed: int) -> tuple[Body, nn.Module]:
    """Letters by their angles to learnt centres, with a margin (Deng et al. 2019); the network, and the centres beside it."""
    network, centres = mlp(576, 128, 32), nn.Linear(32, 36, bias=False)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        cosines = F.normalize(model(batch[0].flatten(1)), dim=1) @ F.normalize(centres.weight, dim=1).mT
        return F.cross_entropy(16 * (cosines - 0.2 * F.one_hot(batch[1], 36)), batch[1])

    return body(network, lambda s: Pictures(s), seed, loss), centres


@row(
    ROWS, STRUCTURE, "ArcFace", "not_in_optimizer"
)  # 4uiiurz1/pytorch-adacos#10, wujiyang/Face_Pytorch#10, KaiyangZhou/pytorch-center-loss#22
def centres_forgotten(seed: int, sick: bool) -> Program:
    """the loss has weights of its own, the classes' centres, and the optimizer is given the network's alone"""
    loop_body, centres = margin(seed)
    given = nn.ModuleList([loop_body.model] if sick else [loop_body.model, centres])
    return Loop(loop_body, [adamw(given, loop_body.lr)]).program()


@row(ROWS, STRUCTURE, "GPT-2", "not_in_optimizer")  # huggingface/transformers#3532, huggingface/transformers#3519
def resized_too_late(seed: int, sick: bool) -> Program:
    """new tokens are added after the optimizer was built: it moves the old table, and the model reads a new one"""
    loop_body = language_model("gpt2", seed)
    before = [adamw(loop_body.model, loop_body.lr)]
    model, table = loop_body.model, nn.Embedding(260, 64)
    nn.init.normal_(table.weight, std=0.02)
    table.weight.data[:256] = model.get_input_embeddings().weight.data
    model.set_input_embeddings(table)
    model.lm_head, model.config.vocab_size = nn.Linear(64, 260, bias=False), 260
    model.lm_head.weight = table.weight
    return Loop(loop_body, before if sick else [adamw(loop_body.model, loop_body.lr)]).program()
