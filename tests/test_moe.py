"""Experts against plain loops and known limits: who computes which token, with what weight, and what is dropped."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agreement, gradients, perturb, seeded, tiny
from torch import Tensor

from moe_lab.model.layers import SwiGLU
from moe_lab.model.moe import MoE, Router, Routing, load_balancing_loss, router_z_loss


def new_moe(**changes) -> MoE:
    moe = MoE(tiny(**changes))
    for index, p in enumerate(moe.parameters()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(index))
    return moe


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive(moe: MoE, x: Tensor, capacity: float = math.inf) -> tuple[Tensor, int]:
    """One token after the other in float64, and the number of dropped slots."""
    gate, up, down = (stack.double() for stack in (moe.gate_proj, moe.up_proj, moe.down_proj))
    linears = [layer.weight.double() for layer in (moe.router.mlp.hidden_proj, moe.router.mlp.gate) if layer]
    taken, dropped, rows = [0] * moe.n_experts, 0, []
    for token in x.double().flatten(0, 1):
        hidden = F.silu(linears[0] @ token) if len(linears) == 2 else token
        logits = (linears[-1] @ hidden).tolist()
        best = sorted(range(moe.n_experts), key=lambda e: -logits[e])[: moe.router.top_k]
        total = sum(math.exp(logits[e]) for e in best)
        y = torch.zeros_like(token)
        for e in best:
            taken[e] += 1
            if taken[e] > capacity:
                dropped += 1
                continue
            y = y + math.exp(logits[e]) / total * (down[e] @ (F.silu(gate[e] @ token) * (up[e] @ token)))
        rows.append(y)
    return torch.stack(rows).view(x.shape), dropped


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 50)], ids=str)
@pytest.mark.parametrize("changes", [{}, {"moe_router_hidden": 0}, {"moe_top_k": 1}, {"moe_top_k": 4}], ids=str)
def test_experts_follow_a_loop_over_tokens(changes: dict, shape: tuple) -> None:
    moe, x = new_moe(**changes), draw(*shape, 16)
    expected, _ = naive(moe, x)
    assert_agreement({"y": moe(x)[0]}, {"y": expected})


def test_equal_experts_are_one_dense_layer() -> None:
    moe, dense = new_moe(), SwiGLU(16, 16)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(dense, name).weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
            getattr(moe, name).copy_(getattr(dense, name).weight.expand(4, -1, -1))
    x, weight = draw(2, 20, 16), draw(2, 20, 16, seed=1)
    y, expected = moe(x)[0], dense(x)[0]
    assert_agreement({"y": y}, {"y": expected})
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    ours = {name: grad.sum(dim=0) for name, grad in gradients(moe).items() if not name.startswith("router")}
    assert_agreement(ours, {name.removesuffix(".weight"): grad for name, grad in gradients(dense).items()})


def test_nothing_is_dropped_by_default_even_when_one_expert_takes_all() -> None:
    moe = new_moe(moe_top_k=1, moe_router_hidden=0).train()
    with torch.no_grad():
        moe.router.mlp.gate.weight.zero_()[2] = 10.0
    x = draw(2, 40, 16).abs()  # so that expert 2 wins every token
    y, routing = moe(x)
    assert routing.expert_ids.eq(2).all() and routing.drop_rate == 0
    assert_agreement({"y": y}, {"y": naive(moe, x)[0]})


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(1, 7), (2, 30)], ids=str)
def test_capacity_drops_what_a_loop_drops(shape: tuple, factor: float) -> None:
    moe, x = new_moe(moe_capacity_factor=factor).train(), draw(*shape, 16)
    n_slots = shape[0] * shape[1] * 2
    expected, dropped = naive(moe, x, capacity=math.ceil(factor * n_slots / 4))
    y, routing = moe(x)
    assert routing.drop_rate == pytest.approx(dropped / n_slots)
    assert dropped > 0 or factor >= 1
    assert_agreement({"y": y}, {"y": expected})


def test_earlier_tokens_stay() -> None:
    """The first tokens come out as if there were no capacity; later ones lose experts."""
    moe, x = new_moe(moe_capacity_factor=0.5).train(), draw(1, 40, 16)
    same = (moe(x)[0] == moe.eval()(x)[0]).all(dim=-1)[0]
    assert same[:10].all()  # 40 slots an expert share of 20, capacity 10: no expert is full after 10 tokens
    assert not same[-5:].any()


def test_a_capacity_drops_nothing_in_evaluation() -> None:
    moe, x = new_moe(moe_capacity_factor=0.3).eval(), draw(2, 30, 16)
    y, routing = moe(x)
    assert routing.drop_rate == 0
    assert_agreement({"y": y}, {"y": naive(moe, x)[0]})


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_sum_to_one_and_are_the_softmax_renormalised(top_k: int) -> None:
    router = perturb(new_moe(moe_top_k=top_k).router)
    routing = router(draw(30, 16) * 3)
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.ones(30))
    probs = routing.logits.softmax(dim=-1)
    kept = probs.sort(dim=-1, descending=True)
    assert torch.equal(routing.expert_ids, kept.indices[:, :top_k])
    torch.testing.assert_close(routing.weights, kept.values[:, :top_k] / kept.values[:, :top_k].sum(1, keepdim=True))
    assert routing.weights.dtype == routing.logits.dtype == torch.float32


def test_the_load_counts_slots() -> None:
    routing = new_moe().router(draw(30, 16) * 3)
    expected = torch.tensor([(routing.expert_ids == e).sum() / 60 for e in range(4)])
    torch.testing.assert_close(routing.load(), expected)


def test_the_router_stays_in_float32_under_autocast() -> None:
    router, x = seeded(Router, tiny()), draw(30, 16) * 3
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = router(x)
    assert torch.equal(mixed.logits, plain.logits) and mixed.logits.dtype == torch.float32


def test_experts_compute_in_the_format_of_autocast() -> None:
    moe, x = new_moe(), draw(2, 20, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    plain, plain_routing = moe(x)
    assert torch.equal(routing.expert_ids, plain_routing.expert_ids)
    distance = (y - plain).norm() / plain.norm()
    assert 1e-4 < distance < 2e-2  # bfloat16 keeps three digits, and float32 would keep seven


def test_balance_loss_limits() -> None:
    even = torch.arange(8).view(-1, 1) % 4  # each expert takes a quarter of the tokens, whatever the logits say
    assert load_balancing_loss(Routing(even * 0.0 + 1, even, draw(8, 4), torch.zeros(()))) == pytest.approx(1.0)
    collapsed = torch.tensor([50.0, 50.0, 0.0, 0.0, 0.0, 0.0]).expand(9, -1)  # the same 2 of 6 experts for every token
    routing = Routing(torch.full((9, 2), 0.5), collapsed.topk(2).indices, collapsed, torch.zeros(()))
    assert load_balancing_loss(routing) == pytest.approx(6 / 2)


def test_balance_loss_and_its_gradient_in_closed_form() -> None:
    """With f the load and p the mean probability, ∂/∂logit = E / N · p_e (f_e − Σ f p): the busy expert is pushed down."""
    logits = draw(30, 4, seed=2).mul(2).requires_grad_()
    kept, ids = logits.topk(2)
    load_balancing_loss(Routing(kept.softmax(-1), ids, logits, torch.zeros(()))).backward()
    p = logits.detach().double().softmax(-1)
    load = F.one_hot(ids, 4).double().mean(dim=(0, 1))
    expected = 4 / 30 * p * (load - (load * p).sum(-1, keepdim=True))
    assert_agreement({"logits": logits.grad}, {"logits": expected})


def test_balance_loss_needs_a_token() -> None:
    nobody = Routing(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(()))
    with pytest.raises(ValueError, match="^no token was routed$"):
        load_balancing_loss(nobody)


def test_z_loss_in_closed_form() -> None:
    def z_loss(logits: Tensor) -> Tensor:
        return router_z_loss(Routing(logits[:, :2], logits[:, :2].long(), logits, torch.zeros(())))

    assert z_loss(torch.full((5, 8), 3.0)) == pytest.approx((3 + math.log(8)) ** 2)
    logits = draw(10, 4)
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 10
    assert z_loss(logits) == pytest.approx(expected)


@pytest.mark.parametrize("training", [True, False])
def test_rows_that_do_not_count(training: bool) -> None:
    moe, x = new_moe().train(training), draw(2, 20, 16)
    keep = draw(2, 20, seed=1) > 0
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

    moe, x = new_moe(), draw(2, 20, 16).requires_grad_()
    keep, weight = draw(2, 20, seed=1) > 0, draw(2, 20, 16, seed=2)
    results = []
    for run in (None, poisoned):
        if run:
            monkeypatch.setattr(F, "grouped_mm", run)
        moe.zero_grad()
        x.grad = None
        y, _ = moe(x, keep=keep)
        (y * weight).sum().backward()
        results.append({"y": y.detach(), "x": x.grad.clone(), **gradients(moe)})
    assert len(calls) == 3 and min(calls) >= 2 * (~keep).sum()  # there was garbage, and slots that point into it
    for name, clean in results[0].items():
        assert torch.equal(results[1][name], clean), name
    assert not results[0]["x"][~keep].any()
