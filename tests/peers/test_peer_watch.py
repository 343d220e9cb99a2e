"""The watch on others' models and optimizers: transformers in a plain loop, optimi's Kahan summation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from moe_lab.health import Watch
from moe_lab.health.measures import share_of

pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

TEXT = torch.tensor(list(Path(torch.__file__).read_bytes()[:60_000]))  # prose and code, byte by byte


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    """Its head is tied to the embedding, and its table of positions is longer than its vocabulary."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=512, n_embd=32, n_layer=2, n_head=4))


def trained(model: nn.Module, optimizer, n: int = 50) -> Watch:
    generator = torch.Generator().manual_seed(0)
    with Watch(model, optimizer) as watch:
        for step in range(n):
            rows = torch.randint(len(TEXT) - 64, (8,), generator=generator)
            ids = torch.stack([TEXT[row : row + 64] for row in rows])
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * min(1.0, (step + 1) / 20)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            watch.observe(loss=loss)
    return watch


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_transformers_model_in_float32_is_healthy(make) -> None:
    model = make()
    watch = trained(model, AdamW(model.parameters(), lr=1e-3))
    assert [f for f in watch.findings if f.severity != "info"] == []
    assert watch.state.losses[-1] < watch.state.losses[0] - 1
    assert watch.state.forward.vocab_size == 256
    assert watch.state.expected_start == pytest.approx(watch.state.losses[0], abs=0.1)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_transformers_model_in_bfloat16_loses_updates(make) -> None:
    model = make().bfloat16()
    watch = trained(model, AdamW(model.parameters(), lr=1e-3))
    serious = [f for f in watch.findings if f.severity != "info"]
    assert serious[0].rule == "lost_updates" and serious[0].step <= 30
    worst = min((r for r in watch.readings if r.intended_square), key=lambda r: r.realised_intended / r.intended_square)
    assert "ln" in worst.name or "norm" in worst.name


def test_kahan_summation_of_optimi_realises_all() -> None:
    optimi = pytest.importorskip("optimi")
    model = llama().bfloat16()
    watch = trained(model, optimi.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), 60)
    assert [f for f in watch.findings if f.rule in ("lost_updates", "bf16_parameters", "frozen_tensor")] == []
    norms = share_of([r for r in watch.readings if "norm" in r.name])
    rest = share_of([r for r in watch.readings if "norm" not in r.name])
    for share in (norms, rest):
        assert share.rho == pytest.approx(1, abs=max(0.02, 3 * share.error))
    assert any(torch.bfloat16 in r.state_dtypes for r in watch.readings)
