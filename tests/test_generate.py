"""Generation: caches against no caches, choosing against plain loops, and what a user may get wrong."""

import math
import re

import pytest
import torch
from helpers import MECHANISMS, cached_logits, caches_of, model_with, normal, random_ids, refused
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from moe_lab.model.generate import choose, step


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 23])
@pytest.mark.parametrize("name", MECHANISMS)
def test_caches_change_nothing(name: str, length: int) -> None:
    model, prompt = model_with(name), random_ids(3, length)
    generated = model.generate(prompt, 14, temperature=0)
    model.eval()
    ids = prompt
    for _ in range(14):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(generated, ids)
    torch.testing.assert_close(cached_logits(model, ids), model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_prompt_in_one_pass_is_the_prompt_step_by_step(name: str, batch: int) -> None:
    """The same logits, and caches from which the same tokens follow; whatever the mode."""
    model, ids = model_with(name), random_ids(batch, 52)
    slowly = cached_logits(model, ids)
    torch.testing.assert_close(slowly, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)
    model.train()
    for length in (*range(1, 20), 31, 32, 33, 47, 48):
        caches = caches_of(model, batch, 52)
        logits = [step(model, ids[:, :length], caches)]
        logits += [step(model, ids[:, t : t + 1], caches) for t in range(length, length + 4)]
        expected = slowly[:, length - 1 : length + 4]
        torch.testing.assert_close(torch.stack(logits, dim=1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mamba", "routing_mamba"])
def test_the_state_of_mamba_does_not_grow(name: str) -> None:
    model = model_with(name).eval()
    sizes = []
    for length in (4, 40):
        caches = caches_of(model, 2, length)
        states = [state for cache in caches for state in (cache if isinstance(cache, list) else [cache])]
        shapes = [tensor.shape for state in states for tensor in state]
        for t in range(length):
            step(model, random_ids(2, 1, seed=t), caches)
        assert [tensor.shape for state in states for tensor in state] == shapes
        assert all(tensor.any() for state in states for tensor in state)  # and it is used
        sizes.append(sum(shape.numel() for shape in shapes))
    d_inner, experts = 2 * 16, 4 if name == "routing_mamba" else 1
    assert sizes == [2 * experts * 2 * d_inner * (3 + 4)] * 2  # layers, experts, rows: taps - 1 inputs and the state


def naive_distribution(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Probabilities of the tokens that may be chosen, one token at a time."""
    weights = [math.exp(value / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if top_p is not None and mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("top_p", [None, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 50])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choosing_follows_the_naive_distribution(temperature: float, top_k, top_p) -> None:
    """Given the same random numbers, the same distribution chooses the same tokens, however it was computed."""
    logits = normal(4, 7, seed=3) * 1.5
    expected = torch.tensor([naive_distribution(row, temperature, top_k, top_p) for row in logits.tolist()])
    ours, theirs = (torch.Generator().manual_seed(5) for _ in "ab")
    for _ in range(200):
        chosen = choose(logits, temperature, top_k, top_p, ours)
        assert torch.equal(chosen, torch.multinomial(expected, 1, generator=theirs).squeeze(1))


def test_greedy_takes_the_most_likely_whatever_else_is_asked() -> None:
    logits = normal(5, 9)
    assert torch.equal(choose(logits, 0, 2, 0.5, None), logits.argmax(-1))


def test_sampling_repeats_with_its_generator_and_spares_the_global_one() -> None:
    model, prompt = model_with("attention"), random_ids(2, 4)
    before = torch.get_rng_state()
    first, second, other = (
        model.generate(prompt, 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (0, {}, "prompt is empty; give at least one token"),
        (4, {"max_new_tokens": 0}, "max_new_tokens=0 must be more than 0"),
        (40, {}, "max_new_tokens=9 after a prompt of 40 tokens goes past model.max_seq_len=48; ask for at most 8"),
        (4, {"temperature": -0.1}, "temperature=-0.1 must be at least 0"),
        (4, {"top_k": 0}, "top_k=0 must be more than 0"),
        (4, {"top_p": 0.0}, "top_p=0.0 must be more than 0"),
        (4, {"top_p": 1.1}, "top_p=1.1 must be at most 1"),
        ("a quick brown", {}, "a text prompt needs tokenizer=…; load_run returns it beside the model"),
    ],
)
def test_errors_say_what_to_do(prompt: int | str, options: dict, message: str) -> None:
    model = model_with("attention")
    assert model.generate(random_ids(1, 40), 8).shape == (1, 48)  # the last position can be reached
    with refused(ValueError, match=f"^{re.escape(message)}$"):
        model.generate(
            prompt if prompt == "a quick brown" else random_ids(1, prompt), **{"max_new_tokens": 9, **options}
        )


@pytest.fixture
def tokenizer() -> Tokenizer:
    """One token a character of the alphabet, and one for the space."""
    vocabulary = {character: index for index, character in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_a_text_is_continued(tokenizer: Tokenizer) -> None:
    model = model_with("all")
    with torch.no_grad():  # only letters that the tokenizer has
        model.lm_heads[0].weight[27:] = 0
        model.lm_heads[0].weight[:27] *= 50
    text = model.generate("a quick brown", 10, tokenizer=tokenizer, temperature=0)
    ids = model.generate(torch.tensor([tokenizer.encode("a quick brown").ids]), 10, temperature=0)
    assert text == tokenizer.decode(ids[0].tolist())
    assert text.startswith("a quick brown") and len(text) > len("a quick brown")


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_what_generates_and_no_mode_is_touched(training: bool, monkeypatch) -> None:
    """In training, MoD chooses otherwise, and units are dropped. Another thread may be training the model meanwhile."""
    model = model_with("all", dropout=0.5)
    prompt = random_ids(6, 5)
    expected = model.eval().generate(prompt, 8, temperature=0)
    model.train(training)
    monkeypatch.setattr(torch.nn.Module, "train", lambda module, mode=True: pytest.fail("a mode was set"))
    assert torch.equal(model.generate(prompt, 8, temperature=0), expected)
