"""Muon against torch.optim.Muon: parameters and momentum after several steps, matrix by matrix and slice by slice."""

import pytest
import torch
from helpers import normal
from torch import nn

from moe_lab.optim import products
from moe_lab.optim.muon import CONVENTIONS, Muon

SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (16, 16), "row": (1, 9), "column": (9, 1)}
OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def products_in_bfloat16(monkeypatch) -> None:
    """As torch does them everywhere, on a CPU that is slow at it, too."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: True)


def momentum_of(optimizer, p) -> torch.Tensor:
    return optimizer.state[p]["momentum_buffer"]


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_are_bit_equal_after_five_steps(shape: str, convention: str, nesterov: bool) -> None:
    ours, theirs = (nn.Parameter(normal(*SHAPES[shape], seed=0)) for _ in "ab")
    optimizer = Muon([ours], adjust_lr=convention, nesterov=nesterov, **OPTIONS)
    peer = torch.optim.Muon([theirs], adjust_lr_fn=convention, nesterov=nesterov, **OPTIONS)
    for step in range(5):
        ours.grad = normal(*SHAPES[shape], seed=10 + step)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
        assert torch.equal(ours, theirs)
        assert torch.equal(momentum_of(optimizer, ours), momentum_of(peer, theirs))
    assert not torch.allclose(ours, normal(*SHAPES[shape], seed=0), atol=1e-3)


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
    # experts that get few tokens have small gradients: each slice is normalised by its own norm
    sizes = torch.tensor([1.0, 1e-3, 30.0])[:, None, None]
    for step in range(5):
        step_both(stack, slices, *optimizers, normal(3, *SHAPES[shape], seed=10 + step) * sizes)
    assert torch.equal(stack, torch.stack([p.detach() for p in slices]))


def test_a_slice_without_tokens_is_left_alone_and_the_others_are_not() -> None:
    stack, slices, optimizer, peer = stack_and_slices((12, 40))
    for step in range(5):
        grad = normal(3, 12, 40, seed=10 + step)
        if step >= 2:
            grad[1] = 0.0  # after two steps its momentum is not zero: it must neither move nor fade
        if step == 2:
            frozen, memory = stack[1].detach().clone(), momentum_of(optimizer, stack)[1].clone()
            assert memory.any()
        step_both(stack, slices, optimizer, peer, grad)
    assert torch.equal(stack[1], frozen)
    assert torch.equal(momentum_of(optimizer, stack)[1], memory)
    assert torch.equal(stack, torch.stack([p.detach() for p in slices]))


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
