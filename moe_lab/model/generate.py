"""Text from a model: the prompt in one pass, which fills the caches, then one token a step."""

from typing import Annotated

import torch
from torch import Tensor, nn

from moe_lab.config import Count, NonNegative, check_value


def choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """One token id a row, (B,) int64, from logits (B, V). Temperature 0 takes the most likely one. top_k keeps the k
    most likely; top_p then keeps the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020, sec.
    3.1, https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        probs = torch.zeros_like(probs).scatter(1, index, ordered.masked_fill(before >= top_p, 0))
    return torch.multinomial(probs, 1, generator=generator).squeeze(1)  # normalises by itself


def generate(
    model: nn.Module,
    prompt: Tensor | str,
    max_new_tokens: int = 100,
    *,
    tokenizer=None,
    temperature: float = 1.0,
    top_k: int | None = None,
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
    if length == 0:
        raise ValueError("prompt is empty; give at least one token")
    check_value("max_new_tokens", max_new_tokens, Count)
    check_value("temperature", temperature, NonNegative)
    check_value("top_k", top_k, Count | None)
    check_value("top_p", top_p, Annotated[float, "> 0", "<= 1"] | None)
    if (total := length + max_new_tokens) > (limit := model.config.max_seq_len):
        asked = f"max_new_tokens={max_new_tokens} after a prompt of {length} tokens goes past model.max_seq_len={limit}"
        raise ValueError(f"{asked}; ask for at most {limit - length}")
    weight = model.embedding.weight
    ids = prompt.new_empty(batch, total, device=weight.device)
    ids[:, :length] = prompt
    caches = [block.seq_layer.new_cache(batch, total, weight.device, weight.dtype) for block in model.layers]
    done = 0
    with torch.inference_mode():
        for position in range(length, total):
            logits = step(model, ids[:, done:position], caches)
            ids[:, position] = choose(logits, temperature, top_k, top_p, generator)
            done = position
    return tokenizer.decode(ids[0].tolist()) if is_text else ids


def step(model: nn.Module, tokens: Tensor, caches: list) -> Tensor:
    """Logits (B, V) of the token after `tokens` (B, T), which the caches take in: a whole prompt, or one token a row
    after what is there."""
    x = model.embedding(tokens)
    for block, cache in zip(model.layers, caches, strict=True):
        x = block.step(x, cache)
    return model.lm_heads[0](model.final_norm(x[:, -1]))
