"""Kahan summation against optimi, stochastic rounding against torchao, over tens of steps with the same gradients."""

import optimi
import pytest
import torch
from helpers import normal
from torch import Tensor, nn
from torchao.optim.quant_utils import _fp32_to_bf16_sr

from moe_lab.optim.rounding import Rounded, stochastic_round

N_STEPS = 50
BETAS = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.0}


def signs(step: int) -> Tensor:
    """The same in every step: then Adam's moments are exact in optimi's bf16 too, and only the sum can differ."""
    return normal(4096, seed=1).sign()


def noisy(step: int) -> Tensor:
    return 0.5 + normal(4096, seed=100 + step)


@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize(
    ("kind", "theirs", "options", "gradient"),
    [(torch.optim.AdamW, optimi.AdamW, BETAS, signs), (torch.optim.SGD, optimi.SGD, {}, noisy)],
    ids=["adamw", "sgd"],
)
def test_kahan_agrees_with_optimi(kind, theirs, options: dict, gradient, lr: float) -> None:
    start = (1 + 0.3 * normal(4096)).bfloat16()
    a, b, plain = (nn.Parameter(start.clone()) for _ in range(3))
    reference = nn.Parameter(start.float())
    ours = Rounded(kind([a], lr=lr, **options), "kahan")
    peer = theirs([b], lr=lr, kahan_sum=True, foreach=False, triton=False, **options)
    others = [kind([reference], lr=lr, **options), kind([plain], lr=lr, **options)]
    for step in range(N_STEPS):
        for p in (a, b, plain, reference):
            p.grad = gradient(step).bfloat16().to(p.dtype)
        for optimizer in (ours, peer, *others):
            optimizer.step()
    sum_a = a.detach().float() + ours.state[a]["compensation"].float()
    sum_b = b.detach().float() + peer.state[b]["kahan_comp"].float()
    path = (reference.detach() - start.float()).norm()
    assert (sum_a - sum_b).norm() <= 0.01 * path  # of the way travelled
    assert (a == b).float().mean() >= 0.99
    assert (sum_a - reference.detach()).norm() <= 0.05 * path
    assert (plain.detach().float() - reference.detach()).norm() >= 0.5 * path


def test_stochastic_rounding_is_torchaos_with_the_noise_turned_over(monkeypatch) -> None:
    """They round away from zero where noise < fraction, we where fraction + noise carries: noise' = 2^16 - 1 - noise."""
    x = normal(4096, seed=2) * 10 ** (4 * normal(4096, seed=3))
    torch.manual_seed(0)
    ours = stochastic_round(x)
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **options: 65535 - randint(*args, **options))
    torch.manual_seed(0)
    assert torch.equal(ours, _fp32_to_bf16_sr(x))
    assert not torch.equal(ours, x.bfloat16())


def test_stochastic_trajectories_have_torchaos_mean_and_spread() -> None:
    p = nn.Parameter(torch.ones(40_000))
    ours = Rounded(torch.optim.SGD([p], lr=1e-4), "stochastic")
    theirs = torch.ones(40_000).bfloat16()
    for step in range(N_STEPS):
        grad = 1 + 0.5 * normal(1, seed=step)
        p.grad = grad.bfloat16().expand(40_000).clone()
        ours.step()
        theirs = _fp32_to_bf16_sr(theirs.float() - 1e-4 * grad.bfloat16().float())
    a, b = p.detach().double(), theirs.double()
    assert abs(a.mean() - b.mean()) <= 5 * (2 * a.var() / 40_000).sqrt()
    assert a.std() / b.std() == pytest.approx(1, abs=0.05)
    assert a.mean() < 1 - 2e-3
