"""Muon against torch.optim.Muon: parameters and momentum after several steps, matrix by matrix and slice by slice."""

import pytest
import torch
from helpers import normal
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from moe_lab.optim import products
from moe_lab.optim.muon import COEFFICIENTS, CONVENTIONS, EPSILON, Muon, orthogonalise

SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (16, 16), "row": (1, 9), "column": (9, 1)}
OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


@pytest.fixture(autouse=True, params=[True, False], ids=["bfloat16", "float32"])
def fast(request, monkeypatch) -> bool:
    """Whether the device is taken to be fast at bfloat16; torch's Muon takes every device for that."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: request.param)
    return request.param


def momentum_of(optimizer, p) -> Tensor:
    return optimizer.state[p]["momentum_buffer"]


def assert_moved_alike(ours: Tensor, theirs: Tensor, start: Tensor) -> None:
    """Each matrix in the peer's direction, as far; torch's own is off by what bfloat16 rounds away."""
    moved, expected = ((t.detach() - start).reshape(-1, start.shape[-2] * start.shape[-1]) for t in (ours, theirs))
    assert torch.cosine_similarity(moved, expected).min() >= 0.999
    torch.testing.assert_close(moved.norm(dim=1), expected.norm(dim=1), rtol=0.03, atol=0.0)


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_move_as_the_peers_for_five_steps(shape: str, convention: str, nesterov: bool) -> None:
    start = normal(*SHAPES[shape], seed=0)
    ours, theirs = (nn.Parameter(start.clone()) for _ in "ab")
    optimizer = Muon([ours], adjust_lr=convention, nesterov=nesterov, **OPTIONS)
    peer = torch.optim.Muon([theirs], adjust_lr_fn=convention, nesterov=nesterov, **OPTIONS)
    for step in range(5):
        ours.grad = normal(*SHAPES[shape], seed=10 + step)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
        assert torch.equal(momentum_of(optimizer, ours), momentum_of(peer, theirs))
    assert_moved_alike(ours, theirs, start)


def exact(matrix: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("decades", [0, 2, 4])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (96, 96), (48, 128), (200, 64)], ids=str)
def test_a_direction_is_no_worse_than_the_peers(shape: tuple, decades: int, fast: bool) -> None:
    """Against the iteration in float64, for random matrices and for singular values that span decades."""
    matrix = normal(*shape, seed=3)
    if decades:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left * torch.logspace(0, -decades, min(shape)) @ right
    ours, wanted = orthogonalise(matrix, 5).double(), exact(matrix)
    theirs = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, EPSILON).double()
    error, allowed = ((t - wanted).norm() / wanted.norm() for t in (ours, theirs))
    assert error <= (1.1 * allowed if fast else 1e-3)
    if decades < 4:  # beyond, what is small is filled with the peer's rounding
        spread, allowed = ((torch.linalg.svdvals(t) - 1).norm() for t in (ours, theirs))
        assert spread <= 1.01 * allowed
    if not decades:
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) >= 0.999


def stack_and_slices(shape: tuple, **options) -> tuple:
    """A stack of three matrices and its slices, each with its optimizer."""
    stack = nn.Parameter(normal(3, *shape, seed=0))
    slices = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    convention = options.get("adjust_lr", "original")
    return (
        stack,
        slices,
        Muon([stack], **options, **OPTIONS),
        torch.optim.Muon(slices, adjust_lr_fn=convention, **OPTIONS),
    )


def step_both(stack: nn.Parameter, slices: list, optimizer, peer, grad: torch.Tensor) -> None:
    stack.grad = grad
    for matrix, part in zip(slices, grad, strict=True):
        matrix.grad = part.clone() if part.any() else None
    optimizer.step()
    peer.step()


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_each_slice_of_a_stack_is_a_matrix_of_its_own(shape: str, convention: str) -> None:
    stack, slices, *optimizers = stack_and_slices(SHAPES[shape], adjust_lr=convention)
    start = stack.detach().clone()
    # experts that get few tokens have small gradients: each slice is normalised by its own norm
    sizes = torch.tensor([1.0, 1e-3, 30.0])[:, None, None]
    for step in range(5):
        step_both(stack, slices, *optimizers, normal(3, *SHAPES[shape], seed=10 + step) * sizes)
    assert_moved_alike(stack, torch.stack([p.detach() for p in slices]), start)


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
def test_a_slice_without_tokens_is_left_alone_and_the_others_are_not(nesterov: bool) -> None:
    stack, slices, optimizer, peer = stack_and_slices((12, 40), nesterov=nesterov)
    for group in peer.param_groups:
        group["nesterov"] = nesterov
    start = stack.detach().clone()
    for step in range(5):
        grad = normal(3, 12, 40, seed=10 + step)
        if step >= 2:
            grad[1] = 0.0  # after two steps its momentum is not zero: it must neither move nor fade
        if step == 3:
            grad[0] *= 1e-30  # whose squares are zero: it has a gradient
        if step == 2:
            frozen, memory = stack[1].detach().clone(), momentum_of(optimizer, stack)[1].clone()
            assert memory.any()
        step_both(stack, slices, optimizer, peer, grad)
    assert torch.equal(stack[1], frozen)
    assert torch.equal(momentum_of(optimizer, stack)[1], memory)
    assert_moved_alike(stack, torch.stack([p.detach() for p in slices]), start)
    torch.testing.assert_close(momentum_of(optimizer, stack), torch.stack([momentum_of(peer, p) for p in slices]))


def test_bfloat16_momentum_is_not_normalised_in_place() -> None:
    """torch.optim.Muon without Nesterov divides its own momentum by its norm, where no conversion makes a copy.

    The second half states the peer's bug, so that it is seen when torch repairs it.
    """
    ours, theirs = (nn.Parameter(normal(12, 40, seed=0).bfloat16()) for _ in "ab")
    optimizer = Muon([ours], nesterov=False, **OPTIONS)
    peer = torch.optim.Muon([theirs], nesterov=False, **OPTIONS)
    expected = torch.zeros_like(ours.detach())
    for step in range(3):
        ours.grad = normal(12, 40, seed=10 + step).bfloat16()
        theirs.grad = ours.grad.clone()
        expected = expected.lerp(ours.grad, 1 - OPTIONS["momentum"])
        optimizer.step()
        peer.step()
    assert torch.equal(momentum_of(optimizer, ours), expected)
    assert expected.float().norm() > 2
    assert momentum_of(peer, theirs).float().norm() == pytest.approx(1.0, abs=0.02)
