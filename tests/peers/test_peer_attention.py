"""Attention against transformers' Llama: outputs and gradients, with copied weights."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agreement, assert_nonzero, normal, perturb, seeded, there_and_back, tiny
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from moe_lab.model.attention import BLOCK, SHORT, Attention, attend


def pair(d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None, theta: float):
    """Our layer and theirs, with equal weights, and their rotary tables."""
    sizes = {"d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
    ours = perturb(seeded(Attention, tiny(**sizes, rope_theta=theta)))
    config = LlamaConfig(
        hidden_size=d_model,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim or d_model // n_heads,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="eager",
    )
    theirs = LlamaAttention(config, layer_idx=0).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, LlamaRotaryEmbedding(config)


SIZES = [(16, 4, 2, None, 10000.0), (24, 6, 2, 8, 10000.0), (32, 4, 4, None, 500.0), (16, 4, 1, 6, 10000.0)]


@pytest.mark.parametrize("gaps", [False, True], ids=["in_a_row", "with_gaps"])
@pytest.mark.parametrize("length", [1, 2, 40, 2 * BLOCK + 5])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_llama_attention_agrees(sizes, length: int, gaps: bool) -> None:
    ours, theirs, rotary = pair(*sizes)
    x, positions = normal(2, length, sizes[0]), torch.arange(length).expand(2, -1)
    if gaps:  # what MoD passes: each sequence its own selection, in order of time
        positions = normal(2, 3 * length, seed=1).argsort(dim=1)[:, :length].sort(dim=1).values
    future = torch.full((length, length), -torch.inf).triu(1)[None, None]
    our_output, our_gradients = there_and_back(ours, x, positions)
    tables = rotary(x, positions)
    their_output, their_gradients = there_and_back(theirs, x, position_embeddings=tables, attention_mask=future)
    assert_agreement(our_output, their_output)
    assert_agreement(our_gradients, their_gradients)
    if length > 1:  # one token attends to itself alone, whatever its query and key
        assert_nonzero(our_gradients)


def heads(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values of two sequences, four query heads on two others."""
    return [normal(2, n, length, 8, seed=n).mul(2).to(dtype).requires_grad_() for n in (4, 2, 2)]


@pytest.mark.parametrize("length", [BLOCK, SHORT, SHORT + 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_by_blocks_is_torchs(dtype, tolerance, length: int) -> None:
    ours, theirs = heads(length, dtype), heads(length, torch.float64)
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    y, expected = attend(*ours), F.scaled_dot_product_attention(*theirs, is_causal=True, enable_gqa=True)
    (grads, their_grads) = (
        torch.autograd.grad(out, qkv, normal(*out.shape).to(out)) for out, qkv in ((y, ours), (expected, theirs))
    )
    for a, b in zip((y, *grads), (expected, *their_grads), strict=True):
        assert a.dtype == dtype
        assert_agreement({"tensor": a.double()}, {"tensor": b}, tolerance)


def test_no_block_sees_what_comes_later() -> None:
    q, k, v = heads(3 * BLOCK, torch.float32)
    before, where = attend(q, k, v), BLOCK + 7
    later = torch.arange(3 * BLOCK).unsqueeze(1) >= where
    after = attend(q, torch.where(later, k + 1, k), torch.where(later, -v, v))
    assert torch.equal(after[:, :, :where], before[:, :, :where])
    assert (after != before)[:, :, where:].any(dim=-1).all()
