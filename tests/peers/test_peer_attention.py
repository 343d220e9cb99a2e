"""Attention against transformers' Llama: outputs and gradients, with copied weights."""

import pytest
import torch
from helpers import assert_agreement, assert_nonzero, normal, perturb, seeded, there_and_back, tiny
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from moe_lab.model.attention import Attention


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
@pytest.mark.parametrize("length", [1, 2, 17, 40])
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
