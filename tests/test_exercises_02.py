"""The checks of notebook 02 accept the printed solutions and refuse what a reader is likely to get wrong."""

import math

import helpers
import pytest
import torch
from checks import exercises_02


@pytest.fixture
def solved() -> dict:
    return helpers.solved("02")


def test_the_solutions_pass(solved) -> None:
    assert exercises_02.check_kv_numbers(solved["kv_numbers"])
    assert exercises_02.check_depth_layer(solved["depth_layer"])
    assert exercises_02.check_leak(solved["leak"])


def n_attention(config) -> int:
    return sum(not config.is_mamba(layer) for layer in range(config.n_layers))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda c, n: n_attention(c) * c.n_kv_heads * c.width_of_head * n, "keys and values"),
        (lambda c, n: 2 * c.n_kv_heads * c.width_of_head * n, "one layer's cache"),
        (lambda c, n: n_attention(c) * 2 * c.n_heads * c.width_of_head * n, "query heads share"),
        (lambda c, n: c.n_layers * 2 * c.n_kv_heads * c.width_of_head * n, "Mamba layers keep no"),
        (lambda c, n: n_attention(c) * 2 * c.n_kv_heads * (c.d_model // c.n_heads) * n, "attention layers × 2"),
        (lambda c, n: n_attention(c) * 2 * c.n_kv_heads * c.width_of_head * 100, "twice the tokens"),
        (lambda c, n: (c.n_layers - len(c.mamba_layers)) * 2 * c.n_kv_heads * c.width_of_head * n, "is_mamba"),
        (None, "not started"),
    ],
)
def test_kv_numbers_refuses(wrong, hint, capsys) -> None:
    assert not exercises_02.check_kv_numbers(wrong)
    assert hint in capsys.readouterr().out


def depth_layer(x, scores, capacity, sublayer, bug):
    """The solution, with one bug in it."""
    n_chosen = math.floor(capacity * len(x)) if bug == "floor" else math.ceil(capacity * len(x))
    best = scores.topk(n_chosen, largest=bug != "lowest").indices
    places = best if bug == "B04" else best.sort().values
    positions = torch.arange(len(places)) if bug == "B17" else places
    y = sublayer(x[places], positions)
    if bug == "softmax":
        y = scores.softmax(dim=0)[places][:, None] * y
    elif bug != "B05":
        weight = scores.detach() if bug == "detached" else scores
        y = weight[places].sigmoid()[:, None] * y
    if bug == "B03":
        return x + x.index_add(0, places, y)
    if bug == "chosen only":
        return x[places] + y
    if bug == "zeroed":
        return torch.zeros_like(x).index_add(0, places, x[places] + y)
    if bug == "in place":
        x[places] = x[places] + y
        return x
    return x.index_add(0, places, y)


@pytest.mark.parametrize(
    ("bug", "hint"),
    [
        ("floor", "ceil"),
        ("lowest", "highest scores"),
        ("B04", "(B04)"),
        ("B17", "(B17)"),
        ("chosen only", "all T tokens"),
        ("B03", "(B03)"),
        ("zeroed", "(B03)"),
        ("B05", "does not multiply"),
        ("softmax", "sigmoid(score)"),
        ("detached", "no gradient"),
        ("in place", "writes into x"),
    ],
)
def test_depth_layer_refuses(bug, hint, capsys) -> None:
    assert not exercises_02.check_depth_layer(lambda *arguments: depth_layer(*arguments, bug=bug))
    assert hint in capsys.readouterr().out


def other(ids: torch.Tensor, places: slice, vocab_size: int) -> torch.Tensor:
    changed = ids.clone()
    changed[:, places] = (changed[:, places] + 1) % vocab_size
    return changed


def up_to_cut(fn, ids, cut, vocab_size):
    return (fn(other(ids, slice(cut, None), vocab_size)) - fn(ids))[:, : cut + 1].abs().max()


def one_token(fn, ids, cut, vocab_size):
    return (fn(other(ids, slice(cut, cut + 1), vocab_size)) - fn(ids))[:, :cut].abs().max()


def last_token(fn, ids, cut, vocab_size):
    return (fn(other(ids, slice(-1, None), vocab_size)) - fn(ids))[:, :cut].abs().max()


def next_and_last(fn, ids, cut, vocab_size):
    changed = other(other(ids, slice(-1, None), vocab_size), slice(cut, min(cut + 1, ids.shape[1] - 1)), vocab_size)
    return (fn(changed) - fn(ids))[:, :cut].abs().max()


def signed(fn, ids, cut, vocab_size):
    return (fn(other(ids, slice(cut, None), vocab_size)) - fn(ids))[:, :cut].max()


def redrawn(fn, ids, cut, vocab_size):
    """Random tokens: now and then the last one stays as it was, and a leak from there is missed."""
    changed = ids.clone()
    generator = torch.Generator().manual_seed(int(ids.sum()) + cut)
    changed[:, cut:] = torch.randint(vocab_size, changed[:, cut:].shape, generator=generator)
    return (fn(changed) - fn(ids))[:, :cut].abs().max()


def outside(fn, ids, cut, vocab_size):
    changed = ids.clone()
    changed[:, cut:] += 1
    return (fn(changed) - fn(ids))[:, :cut].abs().max()


def in_place(fn, ids, cut, vocab_size):
    before = fn(ids)
    ids[:, cut:] = (ids[:, cut:] + 1) % vocab_size
    return (fn(ids) - before)[:, :cut].abs().max()


def by_gradient(fn, ids, cut, vocab_size):
    """What the gradient test sees where logits do not hang on a differentiable path: nothing."""
    return torch.zeros(())


def neighbours_only(fn, ids, cut, vocab_size):
    """Looks at the place before the cut alone."""
    return (fn(other(ids, slice(cut, None), vocab_size)) - fn(ids))[:, cut - 1].abs().max()


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (up_to_cut, "not cut itself"),
        (one_token, "only the last token leaks"),
        (last_token, "place cut - 1 sees token cut"),
        (redrawn, "only the last token leaks"),
        (signed, "whatever its sign"),
        (neighbours_only, "comparing scores over time"),
        (next_and_last, "comparing scores over time"),
        (outside, "vocab_size"),
        (in_place, "writes into ids"),
        (by_gradient, "you did not find it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_leak_refuses(wrong, hint, capsys) -> None:
    assert not exercises_02.check_leak(wrong)
    assert hint in capsys.readouterr().out
