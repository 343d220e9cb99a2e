"""Experts against plain loops and known limits: who computes which token, with what weight."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agreement, normal, perturb, seeded, there_and_back, tiny
from torch import Tensor

from moe_lab.model.layers import SwiGLU
from moe_lab.model.moe import MoE, Router, Routing, load_balancing_loss, router_z_loss


def new_moe(**changes) -> MoE:
    moe = MoE(tiny(**changes))
    for index, p in enumerate(moe.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(index))
    return moe


def naive(moe: MoE, x: Tensor) -> Tensor:
    """One token after the other in float64."""
    gate, up, down = (stack.double() for stack in (moe.gate_proj, moe.up_proj, moe.down_proj))
    linears = [layer.weight.double() for layer in (moe.router.mlp.hidden_proj, moe.router.mlp.gate) if layer]
    rows = []
    for token in x.double().flatten(0, 1):
        hidden = F.silu(linears[0] @ token) if len(linears) == 2 else token
        logits = (linears[-1] @ hidden).tolist()
        best = sorted(range(moe.n_experts), key=lambda e: -logits[e])[: moe.router.top_k]
        total = sum(math.exp(logits[e]) for e in best)
        y = torch.zeros_like(token)
        for e in best:
            y = y + math.exp(logits[e]) / total * (down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token)))
        rows.append(y)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 50)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"moe_router_hidden": 0}, {"moe_top_k": 1}, {"moe_top_k": 4}], ids=str)
def test_experts_follow_a_loop_over_tokens(changes: dict, shape: tuple) -> None:
    moe, x = new_moe(**changes), normal(*shape, 16)
    assert_agreement({"y": moe(x)[0]}, {"y": naive(moe, x)})


def test_equal_experts_are_one_dense_layer() -> None:
    moe, dense = new_moe(), SwiGLU(16, 16)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(dense, name).weight.copy_(0.3 * normal(16, 16, seed=len(name)))
            getattr(moe, name).copy_(getattr(dense, name).weight.expand(4, -1, -1))
    (y, grads), (expected, their_grads) = (there_and_back(layer, normal(2, 20, 16)) for layer in (moe, dense))
    assert_agreement(y, expected)
    ours = {f"{name}.weight": grads[name].sum(dim=0) for name in ("gate_proj", "up_proj", "down_proj")}
    assert_agreement(ours, {name: their_grads[name] for name in ours})


def test_nothing_is_dropped_even_when_one_expert_takes_all() -> None:
    moe = new_moe(moe_top_k=1, moe_router_hidden=0).train()
    with torch.no_grad():
        moe.router.mlp.gate.weight.zero_()[2] = 10.0
    x = normal(2, 40, 16).abs()  # so that expert 2 wins every token
    y, routing = moe(x)
    assert routing.expert_ids.eq(2).all()
    assert_agreement({"y": y}, {"y": naive(moe, x)})


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_sum_to_one_and_are_the_softmax_renormalised(top_k: int) -> None:
    routing = perturb(new_moe(moe_top_k=top_k).router)(normal(30, 16) * 3)
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(30))
    kept = routing.logits.softmax(dim=-1).sort(dim=-1, descending=True)
    assert torch.equal(routing.expert_ids, kept.indices[:, :top_k])
    torch.testing.assert_close(routing.weights, kept.values[:, :top_k] / kept.values[:, :top_k].sum(1, keepdim=True))
    assert routing.weights.dtype == routing.logits.dtype == torch.float32
    load = [(routing.expert_ids == e).sum() / (30 * top_k) for e in range(4)]
    torch.testing.assert_close(routing.load(), torch.tensor(load))


def test_the_router_stays_in_float32_under_autocast() -> None:
    router, x = seeded(Router, tiny()), normal(30, 16) * 3
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x)
    assert torch.equal(mixed.logits, plain.logits) and mixed.logits.dtype == torch.float32


def test_experts_compute_in_the_format_of_autocast() -> None:
    moe, x = new_moe(), normal(2, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    plain, plain_routing = moe(x)
    assert torch.equal(routing.expert_ids, plain_routing.expert_ids)
    distance = (y - plain).norm() / plain.norm()
    assert 1e-4 < distance < 2e-2  # bfloat16 keeps three digits, and float32 would keep seven


def routed(logits: Tensor, expert_ids: Tensor) -> Routing:
    return Routing(expert_ids * 0.0 + 1 / expert_ids.shape[1], expert_ids, logits)


def test_balance_loss_limits() -> None:
    even = torch.arange(8).view(-1, 1) % 4  # each expert takes a quarter of the tokens, whatever the logits say
    assert load_balancing_loss(routed(normal(8, 4), even)) == pytest.approx(1.0)
    collapsed = torch.tensor([50.0, 50.0, 0.0, 0.0, 0.0, 0.0]).expand(9, -1)  # the same 2 of 6 experts for every token
    assert load_balancing_loss(routed(collapsed, collapsed.topk(2).indices)) == pytest.approx(6 / 2)
    with pytest.raises(ValueError, match="^no token was routed$"):
        load_balancing_loss(routed(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64)))


def test_balance_loss_and_its_gradient_in_closed_form() -> None:
    """With f the load and p the mean probability, ∂/∂logit = E / N · p_e (f_e − Σ f p): the busy expert is pushed down."""
    logits = normal(30, 4, seed=2).mul(2).requires_grad_()
    ids = logits.topk(2).indices
    load_balancing_loss(routed(logits, ids)).backward()
    p = logits.detach().double().softmax(-1)
    load = F.one_hot(ids, 4).double().mean(dim=(0, 1))
    expected = 4 / 30 * p * (load - (load * p).sum(-1, keepdim=True))
    assert_agreement({"logits": logits.grad}, {"logits": expected})


def test_z_loss_in_closed_form() -> None:
    ids = torch.zeros(5, 1, dtype=torch.int64)
    assert router_z_loss(routed(torch.full((5, 8), 3.0), ids)) == pytest.approx((3 + math.log(8)) ** 2)
    logits = normal(5, 4)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 5
    assert router_z_loss(routed(logits, ids)) == pytest.approx(expected)


@pytest.mark.parametrize("training", [True, False])
def test_rows_that_do_not_count(training: bool) -> None:
    moe, x = new_moe().train(training), normal(2, 20, 16)
    keep = normal(2, 20, seed=1) > 0
    y, routing = moe(x, keep=keep)
    everything, all_routing = moe(x)
    assert torch.equal(y[keep], everything[keep]) and not y[~keep].any()
    for part, whole in zip(routing[:3], all_routing[:3], strict=True):
        assert torch.equal(part, whole[keep.flatten()])


class Poisoned(torch.autograd.Function):
    """What a grouped product may do with the rows after the last group: leave garbage there, in both directions."""

    @staticmethod
    def forward(ctx, rows: Tensor, ends: Tensor) -> Tensor:
        ctx.garbage = (torch.arange(len(rows)) >= ends[-1]).unsqueeze(1)
        return rows.masked_fill(ctx.garbage, torch.nan)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.masked_fill(ctx.garbage, torch.nan), None


def test_garbage_rows_reach_neither_outputs_nor_gradients(monkeypatch) -> None:
    product, calls = F.grouped_mm, []

    def poisoned(rows: Tensor, stack: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(len(rows) - offs[-1].item())
        return Poisoned.apply(product(Poisoned.apply(rows, offs), stack, offs=offs), offs)

    moe, x, keep = new_moe(), normal(2, 20, 16), normal(2, 20, seed=1) > 0
    clean, clean_grads = there_and_back(moe, x, keep=keep)
    moe.zero_grad()
    monkeypatch.setattr(F, "grouped_mm", poisoned)
    y, grads = there_and_back(moe, x, keep=keep)
    assert len(calls) == 3 and min(calls) >= 2 * (~keep).sum()  # there was garbage, and slots that point into it
    assert torch.equal(y["output"], clean["output"])
    assert not [name for name in grads if not torch.equal(grads[name], clean_grads[name])]
    assert not grads["input"][~keep].any()
