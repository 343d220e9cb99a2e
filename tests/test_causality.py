"""A token must not change the logits before it. By perturbation, and to the last bit: a top-k over time leaks through a
discrete choice, which neither a gradient nor a tolerance need see."""

import pytest
import torch
from helpers import MECHANISMS, cached_logits, caches_of, model_with, random_ids
from torch import Tensor

from moe_lab.model.generate import step


def all_logits(model, ids: Tensor) -> Tensor:
    """Every head's logits, (n, B, T, V)."""
    output = model(ids)
    return torch.cat([output.logits.unsqueeze(0), output.future_logits])


def changed_from(ids: Tensor, position: int, seed: int = 1) -> Tensor:
    """Other tokens from `position` on: each one differs."""
    other = (ids + 1 + random_ids(*ids.shape, seed=seed, vocab_size=256)) % 257
    return torch.where(torch.arange(ids.shape[1]) >= position, other, ids)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 5, 17])
@pytest.mark.parametrize("name", MECHANISMS)
def test_evaluation_is_causal_at_every_position(name: str, length: int, batch: int) -> None:
    model, ids = model_with(name).eval(), random_ids(batch, length)
    before = all_logits(model, ids)
    for position in range(length):
        after = all_logits(model, changed_from(ids, position, seed=position))
        assert torch.equal(after[:, :, :position], before[:, :, :position]), position
        assert (after != before)[:, :, position].any(dim=-1).all(), position  # the test can fail


@torch.no_grad()
@pytest.mark.parametrize("name", MECHANISMS)
def test_one_token_is_seen_later_on(name: str) -> None:
    """A model without any memory would pass every test of causality."""
    model, ids = model_with(name).eval(), random_ids(1, 12)
    changed = ids.clone()
    changed[:, 0] += 1
    difference = (model(changed).logits - model(ids).logits).abs().amax(dim=(0, 2))
    assert (difference[1:] > 1e-6).any()
    if "mod" not in name and name != "all":  # MoD may skip a token; nothing else may
        assert (difference > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("name", MECHANISMS)
def test_two_sequences_of_a_batch_do_not_meet(name: str) -> None:
    model, ids = model_with(name).eval(), random_ids(3, 12)
    changed = ids.clone()
    changed[1] = changed_from(ids, 0)[1]
    before, after = all_logits(model, ids), all_logits(model, changed)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(after[:, 1], before[:, 1])


@torch.no_grad()
@pytest.mark.parametrize("name", MECHANISMS)
def test_cached_steps_are_causal(name: str) -> None:
    model, ids = model_with(name).eval(), random_ids(3, 12)
    before = cached_logits(model, ids)
    for position in range(12):
        after = cached_logits(model, changed_from(ids, position))
        assert torch.equal(after[:, :position], before[:, :position])
        assert (after != before)[:, position].any(dim=-1).all()


@torch.no_grad()
def test_what_lies_ahead_in_the_cache_is_not_read() -> None:
    model, ids = model_with("attention").eval(), random_ids(2, 6)
    clean, dirty = (caches_of(model, 2, 9) for _ in "ab")
    for cache in dirty:
        cache.keys.fill_(7.0)
        cache.values.fill_(7.0)
        cache.kept.fill_(True)
    for t in range(6):
        token = ids[:, t : t + 1]
        assert torch.equal(step(model, token, dirty), step(model, token, clean))


@torch.no_grad()
@pytest.mark.parametrize("name", MECHANISMS)
def test_in_training_only_the_choice_of_depth_leaks(name: str) -> None:
    """MoD's top C looks at the whole sequence: the leak is real, and everything else has none."""
    model, ids = model_with(name).train(), random_ids(1, 33)
    before = all_logits(model, ids)
    leak = max(
        (all_logits(model, changed_from(ids, position)) - before)[:, :, :position].abs().max().item()
        for position in (4, 12, 20, 32)
    )
    assert leak > 1e-3 if name in ("mod", "all") else leak == 0
