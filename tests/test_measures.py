"""Measures against closed forms, exhaustive search and naive loops."""

import math

import numpy as np
import pytest
import torch
from helpers import seeded
from torch import Tensor

from moe_lab.health import measures
from moe_lab.health.during.bank import Tracked, banks_of

ALL_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
FINITE_BF16 = ALL_BF16[ALL_BF16.isfinite()]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ulp_is_the_distance_to_the_next_number(dtype) -> None:
    """Around every power of two, below the smallest normal number, and in between."""
    info = torch.finfo(dtype)
    smallest, largest = (math.frexp(limit)[1] for limit in (info.smallest_normal, info.max))
    powers = torch.exp2(torch.arange(smallest - 1, largest, dtype=torch.float64))
    drawn = normal(500).double() * 10.0 ** torch.arange(-4, 1).repeat(100)
    x = torch.cat(
        [powers, powers * (2 - 2 * info.eps), powers * 1.37, -powers, drawn, torch.tensor([0.0, info.tiny / 2])]
    )
    x = x.to(dtype)
    following = torch.nextafter(x.abs(), torch.tensor(math.inf, dtype=dtype))
    found = measures.ulp(x, dtype)
    assert torch.equal(found.double(), following.double() - x.abs().double())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert measures.ulp(torch.tensor(info.max, dtype=dtype), dtype).isfinite()


def test_from_1_updates_are_lost_up_to_2_to_the_minus_8_and_down_to_2_to_the_minus_9() -> None:
    """Every bfloat16 number is tried as an update, and every float32 number around the two thresholds."""
    lost = FINITE_BF16[measures.is_lost(torch.ones(len(FINITE_BF16)), FINITE_BF16, torch.bfloat16)]
    assert (lost.max().item(), lost.min().item()) == (2**-8, -(2**-9))
    for sign, threshold in ((1, 2**-8), (-1, 2**-9)):
        middle = torch.tensor(threshold).view(torch.int32).item()
        near = sign * torch.arange(middle - 2**16, middle + 2**16, dtype=torch.int32).view(torch.float32)
        largest = near[measures.is_lost(torch.ones(len(near)), near, torch.bfloat16)].abs().max().item()
        assert threshold <= largest <= threshold + 2**-24  # the sum in float32 is rounded, too


def test_lost_agrees_with_choosing_the_nearest_number_by_hand() -> None:
    numbers = np.unique(FINITE_BF16.double().numpy())
    weight = normal(300).bfloat16()
    update = normal(300, 1).flatten() * 10.0 ** -torch.arange(1.0, 4.0).repeat(100)
    update[:5] = 0
    for w, u, lost in zip(weight, update, measures.is_lost(weight, update, torch.bfloat16), strict=True):
        total = (w.float() + u).item()
        at = np.searchsorted(numbers, total)
        pair = numbers[max(0, at - 1) : at + 1]
        distance = np.abs(pair - total)
        nearest = pair[distance.argmin()]
        if len(pair) == 2 and distance[0] == distance[1]:  # a tie goes to the even one
            nearest = next(n for n in pair if torch.tensor(n).bfloat16().view(torch.int16).item() % 2 == 0)
        assert lost.item() == (nearest == w.item() and u.item() != 0)


def test_realised_share() -> None:
    u = normal(1000)
    assert measures.realised_share(0.3 * u, u) == pytest.approx(0.3, rel=1e-6)
    assert measures.realised_share(torch.stack([u, -u]), torch.stack([u, u])) == pytest.approx(0)
    assert math.isnan(measures.realised_share(u, 0 * u))


@pytest.mark.parametrize("rms", [1e-3, 4e-3, 2e-2])
def test_what_a_norm_weight_of_1_loses_follows_from_the_normal_distribution(rms) -> None:
    up, down = (math.erf(bound / rms / math.sqrt(2)) / 2 for bound in (2**-8, 2**-9))
    assert measures.predict_lost(torch.ones(200_000), rms) == pytest.approx(up + down, abs=0.005)


def test_prediction_goes_from_nothing_lost_to_all() -> None:
    w = normal(10_000)
    assert measures.predict_lost(w, 1e-7) == pytest.approx(1, abs=0.05)
    assert measures.predict_lost(w, 10.0) == pytest.approx(0, abs=0.001)
    assert measures.predict_lost(w, 1e-6, torch.float32) == pytest.approx(0, abs=0.05)


def test_the_reach_tends_to_the_largest_step() -> None:
    for betas in ((0.9, 0.95), (0.9, 0.999), (0.5, 0.6)):
        tail = measures.adam_reach([0.0] * 9999 + [1.0], betas)
        assert tail == pytest.approx(measures.adam_ratio_bound(math.inf, betas), rel=1e-4)
    assert measures.adam_reach([]) == 0


def test_the_start_is_what_random_logits_show() -> None:
    logits = 0.5 * normal(4000, 500)
    targets = torch.arange(4000) % 500
    found = torch.nn.functional.cross_entropy(logits, targets).item()
    assert measures.expected_start(500, 0.25) == pytest.approx(found, abs=0.03)


def test_trend_is_the_least_squares_line() -> None:
    y = normal(50).cumsum(0).tolist()
    (slope, _), covariance = np.polyfit(np.arange(50), y, 1, cov=True)
    assert measures.trend(y) == pytest.approx((slope, math.sqrt(covariance[0, 0])))


def bank_of_two():
    """A bank with a bf16 vector and a matrix, of which some elements moved, some had a gradient, and with intents."""
    params = [torch.ones(40).bfloat16(), seeded(torch.randn, 30, 50).bfloat16()]
    tracked = [Tracked(name, p) for name, p in (("a.1.weight", params[0]), ("b.weight", params[1]))]
    (bank,) = banks_of(tracked)
    starts = [p.clone().float() for p in params]
    intents, touched = [], []
    for seed, (t, p) in enumerate(zip(tracked, params, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        intent = torch.randn(p.shape, generator=generator) * 0.004
        p.grad = (torch.rand(p.shape, generator=generator) < 0.7).to(p.dtype)
        bank.intend(t, t.sample(intent))
        touched.append(p.grad != 0)
        intents.append(intent)
        p.copy_(p.float() + intent)
    bank.touch(tracked)
    return bank, tracked, params, starts, intents, touched


def test_a_reading_is_what_a_loop_over_elements_finds() -> None:
    bank, tracked, params, starts, intents, touched = bank_of_two()
    bank.read(1)
    assert [r.kind for r in tracked] == ["a.*.weight", "b.weight"]
    assert [r.constant for r in tracked] == [True, False]
    for r, p, start, intent, on in zip(tracked, params, starts, intents, touched, strict=True):
        rows = [
            (p.flatten()[i].item(), start.flatten()[i].item(), intent.flatten()[i].item())
            for i in r.index.tolist()
            if on.flatten()[i]
        ]
        moved = [(now - then, u) for now, then, u in rows]
        assert r.n_touched == len(rows) and r.n_elements == len(r.index)
        assert r.unchanged == r.unchanged_lately == sum(d == 0 for d, _ in moved)
        assert r.down == sum(d < 0 for d, _ in moved)
        assert r.meant_down == sum(d != 0 and u < 0 for d, u in moved)
        assert r.moved_square == pytest.approx(sum(d * d for d, _ in moved))
        assert r.realised_intended == pytest.approx(sum(d * u for d, u in moved))
        assert r.intended_square == pytest.approx(sum(u * u for _, u in moved))
        ulps = [u / (np.spacing(np.float32(abs(then))) * 2**16) for _, then, u in rows]
        assert r.ulps_square == pytest.approx(sum(float(x) ** 2 for x in ulps), rel=1e-5)
    unchanged = [r.unchanged for r in tracked]
    bank.read(1)
    assert [r.unchanged_lately for r in tracked] == unchanged  # nothing has moved within a step
    bank.read(2)
    assert [r.unchanged_lately for r in tracked] == [r.n_touched for r in tracked]
    assert [r.unchanged for r in tracked] == unchanged


def test_the_share_and_its_error_are_those_of_resampled_elements() -> None:
    bank, tracked, params, starts, intents, touched = bank_of_two()
    bank.read(1)
    matrix = tracked[1]
    index = tracked[1].index[touched[1].flatten()[tracked[1].index]]
    r = (params[1].float() - starts[1]).flatten()[index]
    u = intents[1].flatten()[index]
    share = measures.share_of([matrix])
    assert share.rho == pytest.approx(measures.realised_share(r, u), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(u), (2000, len(u)), generator=generator)
    resampled = (r[drawn] * u[drawn]).sum(1) / (u[drawn] ** 2).sum(1)
    assert share.error == pytest.approx(resampled.std().item(), rel=0.1)
    matrix.intended_square = None
    assert measures.share_of([matrix]) is None


def test_the_states_of_a_gradient_are_told_apart() -> None:
    r = Tracked("weight", torch.ones(9))
    r.n_touched, r.unchanged = 9, 4
    told = [r.gradient]
    for column, value in {"no_gradient": 3, "zero_gradient": 1, "with_gradient": 1, "unchanged": 9}.items():
        setattr(r, column, value)
        told.append(r.gradient)
    assert told == ["-", "none", "zero", "yes", "lost"]
