"""The selective scan against the recurrence it stands for, and the block around it."""

import pytest
import torch
from helpers import assert_agreement, assert_nonzero, normal, perturb, seeded, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lab import build_model
from moe_lab.model import scan
from moe_lab.model.mamba import Mamba, RoutingMamba
from moe_lab.model.scan import selective_scan

NAMES = ("delta", "A", "B", "C", "x")


def loop(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t h_t, as it is written."""
    state, ys = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = (delta[:, t, None] * A).exp() * state + B[:, t, :, None] * (delta[:, t] * x[:, t])[:, None]
        ys.append((C[:, t, :, None] * state).sum(1))
    return torch.stack(ys, dim=1), state


def draw(length: int, batch: int = 2, d_state: int = 3, d_inner: int = 5, dtype=torch.float64) -> tuple[Tensor, ...]:
    delta, A = normal(batch, length, d_inner).double().exp() * 0.3, -normal(d_state, d_inner, seed=1).double().exp()
    B, C = (normal(batch, length, d_state, seed=seed) for seed in (2, 3))
    return tuple(t.to(dtype).requires_grad_() for t in (delta, A, B, C, normal(batch, length, d_inner, seed=4)))


@pytest.fixture(params=[1, 1000, 2**18], ids="{} elements".format)
def elements(request, monkeypatch) -> int:
    """How much of the states is computed at once: blocks of one chunk, of two, and all of it."""
    monkeypatch.setitem(scan.ELEMENTS, "cpu", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 32, 33, 64, 99])
def test_the_scan_is_the_recurrence(elements: int, length: int, dtype: torch.dtype) -> None:
    inputs = draw(length, dtype=dtype)
    twins = [t.detach().double().requires_grad_() for t in inputs]
    weight, tolerance = normal(2, length, 5), 1e-12 if dtype == torch.float64 else 1e-5
    (y, state), (expected, last) = selective_scan(*inputs), loop(*twins)
    assert y.dtype == state.dtype == dtype
    assert_agreement({"y": y, "state": state}, {"y": expected, "state": last}, tolerance)
    ours = dict(zip(NAMES, torch.autograd.grad((y * weight).sum(), inputs), strict=True))
    theirs = torch.autograd.grad((expected * weight).sum(), twins)
    assert_agreement(ours, dict(zip(NAMES, theirs, strict=True)), tolerance)
    if length > 1:
        assert_nonzero(ours)


@pytest.mark.parametrize("length", [1, 2, 33])
def test_the_gradient_is_that_of_the_function(elements: int, length: int) -> None:
    inputs = draw(length, batch=2, d_state=2, d_inner=2)
    assert torch.autograd.gradcheck(lambda *tensors: selective_scan(*tensors)[0], inputs, fast_mode=length > 2)


def test_a_long_decay_neither_overflows_nor_hides(elements: int) -> None:
    """exp(ΣΔA) underflows to nothing; a form that divides by it would give infinities."""
    delta, A, B, C, x = draw(100)
    y, _ = selective_scan(delta * 100, A * 10, B, C, x)
    assert_agreement({"y": y}, {"y": loop(delta * 100, A * 10, B, C, x)[0]}, 1e-12)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), (delta, A, B, C, x)))


@torch.no_grad()
def test_the_scan_stays_in_float32_under_autocast() -> None:
    inputs = draw(30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = selective_scan(*inputs)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, selective_scan(*inputs)[0])


class CountOps(TorchDispatchMode):
    """Counts the operations that compute something; a view costs nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [100, 900])
def test_iterations_are_few(length: int) -> None:
    """Every iteration computes something, so their number is at most that of the operations: two loops within chunks, one
    over them. Where the states of all T positions fit into one block, that is."""
    inputs = draw(length, batch=1, d_state=1, d_inner=1)
    with CountOps() as forward:
        y, _ = selective_scan(*inputs)
    with CountOps() as backward:
        y.sum().backward()
    fixed = 40  # what does not depend on the length
    iterations = 2 * scan.CHUNK + length / scan.CHUNK
    assert forward.count <= iterations + fixed
    assert backward.count <= 2 * iterations + 2 * fixed  # the states once more, then the adjoint


def test_what_is_kept_for_the_gradient_grows_with_the_length_alone(elements: int) -> None:
    """Nothing of the size (B, T, N, D): of the states, one in a chunk at most."""
    kept, d_state, d_inner = [], 9, 5
    for length in (160, 320, 1280):
        y, _ = selective_scan(*draw(length, 2, d_state, d_inner))
        node = y.grad_fn.next_functions[0][0]  # behind the cut to length
        kept.append(sum(t.numel() for t in node.saved_tensors) / 2 / length)
    assert max(kept) / min(kept) < 1.2
    assert max(kept) <= 2 * d_inner + 2 * d_state + d_state * d_inner * (1 / scan.CHUNK + 1 / 160)


def new_block(**changes) -> Mamba:
    block = seeded(Mamba, tiny(**changes))
    for layer in (block.in_proj, block.x_proj, block.out_proj):
        torch.nn.init.normal_(layer.weight, std=0.3, generator=torch.Generator().manual_seed(layer.in_features))
    seeded(block.reset_state_space)
    return perturb(block)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"mamba_d_conv": 2, "ssm_state_dim": 1, "mamba_expand": 1}], ids=str)
@pytest.mark.parametrize("length", [1, 3, 20])
def test_one_token_a_step_gives_the_same(length: int, changes: dict) -> None:
    block = new_block(**changes)
    x = normal(3, length, 16)
    cache = block.new_cache(3, length, x.device, x.dtype)
    steps = [block(x[:, t : t + 1], cache=cache)[0] for t in range(length)]
    torch.testing.assert_close(torch.cat(steps, dim=1), block(x)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_skipped_token_does_not_touch_the_state() -> None:
    block, x = new_block(), normal(3, 10, 16)
    keep = torch.rand(3, 10, generator=torch.Generator().manual_seed(1)) > 0.4
    cache = block.new_cache(3, 10, x.device, x.dtype)
    steps = torch.cat([block.recall(x[:, t : t + 1], keep[:, t : t + 1], cache) for t in range(10)], dim=1)
    for row in range(3):
        expected = block(x[row, keep[row]].unsqueeze(0))[0][0]
        torch.testing.assert_close(steps[row, keep[row]], expected, atol=1e-5, rtol=1e-5)
        before = [tensor[row].clone() for tensor in cache]
        block.recall(x[:, :1] * 5, torch.arange(3).unsqueeze(1) != row, cache)
        assert all(torch.equal(tensor[row], old) for tensor, old in zip(cache, before, strict=True))


@torch.no_grad()
def test_routing_mamba_is_a_mixture_of_whole_blocks() -> None:
    config = tiny(mamba_enabled=True, mamba_layers=(0,), moe_layers=(0,))
    layer = perturb(seeded(RoutingMamba, config))
    for index, block in enumerate(layer.experts):
        block.load_state_dict(perturb(new_block(), seed=index).state_dict())
    x = normal(2, 9, 16)
    keep = torch.arange(9).expand(2, -1) < torch.tensor([[5], [9]])
    y, routing = layer(x, None, keep)
    everything, all_routing = layer(x)
    assert torch.equal(y, everything)
    assert torch.equal(routing.logits, all_routing.logits[keep.flatten()])
    outputs = [block(x)[0].flatten(0, 1) for block in layer.experts]  # every expert scans every token
    chosen = zip(all_routing.expert_ids.tolist(), all_routing.weights.tolist(), strict=True)
    expected = [sum(w * outputs[e][n] for e, w in zip(*pair, strict=True)) for n, pair in enumerate(chosen)]
    assert_agreement({"y": y.flatten(0, 1)}, {"y": torch.stack(expected)})


@pytest.mark.parametrize("routing", [False, True])
def test_start_values_of_the_state_space(routing: bool) -> None:
    """Gu & Dao 2023, sec. 3.6: Δ between 0.001 and 0.1, A = -1 … -N, D = 1; a blanket init would make Δ 0.7."""
    config = tiny(d_model=32, mamba_enabled=True, mamba_layers=(0,), moe_layers=(0,) if routing else ())
    layer = build_model(config, seed=3).layers[0].seq_layer
    for block in layer.experts if routing else [layer]:
        delta = torch.nn.functional.softplus(block.dt_proj.bias.detach().double())
        assert 1e-3 * 0.999 < delta.min() < 3e-3 and 0.03 < delta.max() < 1e-1 * 1.001
        # log-uniform: a linear draw would put the geometric mean at 0.037
        assert delta.log().mean().exp() == pytest.approx(1e-2, rel=0.5)
        assert torch.equal(block.A_log, torch.tensor([1.0, 2, 3, 4]).log().expand(64, 4))
        assert torch.equal(block.rates(), -block.A_log.exp().t())
        assert block.D.eq(1).all()
        bound = block.dt_rank**-0.5
        assert 0.9 * bound < block.dt_proj.weight.abs().max() <= bound
        assert block.conv1d.bias.any()
