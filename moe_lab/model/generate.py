"""Text from a model: the prompt in one pass, which fills the caches, then one token a step."""

import torch
from torch import Tensor, nn


def choose(logits: Tensor, temperature: float, top_p: float | None, generator) -> Tensor:
    """One token id a row, (B,) int64, from logits (B, V). Temperature 0 takes the most likely one. top_p
    keeps the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020, sec. 3.1,
    https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = (logits.float() / temperature).softmax(dim=-1)
    if top_p is not None:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        probs = torch.zeros_like(probs).scatter(1, index, ordered.masked_fill(before >= top_p, 0))
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)  # normalises by itself


def check_options(limit: int, length: int, max_new_tokens: int, temperature, top_p) -> None:
    """Raise ValueError, one line, for what cannot be generated."""
    too_long = f"max_new_tokens={max_new_tokens} after a prompt of {length} tokens goes past model.max_seq_len={limit}"
    problems = {
        "prompt is empty; give at least one token": length == 0,
        f"max_new_tokens={max_new_tokens} must be at least 1": max_new_tokens < 1,
        f"{too_long}; ask for at most {limit - length}": length + max_new_tokens > limit,
        f"temperature={temperature} must be 0 (greedy) or more": temperature < 0,
        f"top_p={top_p} must be more than 0 and at most 1": top_p is not None and not 0 < top_p <= 1,
    }
    for message, is_wrong in problems.items():
        if is_wrong:
            raise ValueError(message)


def generate(
    model: nn.Module,
    prompt: Tensor | str,
    max_new_tokens: int = 100,
    *,
    tokenizer=None,
    temperature: float = 1.0,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | str:
    """Continue a prompt: ids (B, T) int64 → (B, T + max_new_tokens) int64; a text → the text with its continuation. A
    text needs `tokenizer` (a `tokenizers.Tokenizer`). `model` is a LanguageModel; it computes as in evaluation, and its
    mode stays: another thread may train it. Raises ValueError past max_seq_len and for options out of range."""
    is_text = isinstance(prompt, str)
    if is_text:
        if tokenizer is None:
            raise ValueError("a text prompt needs tokenizer=…; load_run returns it beside the model")
        prompt = torch.tensor([tokenizer.encode(prompt).ids], dtype=torch.int64)
    batch, length = prompt.shape
    check_options(model.config.max_seq_len, length, max_new_tokens, temperature, top_p)
    weight = model.embedding.weight
    total = length + max_new_tokens
    ids = prompt.new_empty(batch, total, device=weight.device)
    ids[:, :length] = prompt
    caches = [block.seq_layer.new_cache(batch, total, weight.device, weight.dtype) for block in model.layers]
    done = 0
    with torch.inference_mode():
        for position in range(length, total):
            logits = step(model, ids[:, done:position], caches)
            ids[:, position] = choose(logits, temperature, top_p, generator)
            done = position
    return tokenizer.decode(ids[0].tolist()) if is_text else ids


def step(model: nn.Module, tokens: Tensor, caches: list) -> Tensor:
    """Logits (B, V) of the token after `tokens` (B, T), which the caches take in: a whole prompt, or one token a row
    after what is there."""
    x = model.embedding(tokens)
    for block, cache in zip(model.layers, caches, strict=True):
        x = block.step(x, cache)
    return model.lm_heads[0](model.final_norm(x[:, -1]))
