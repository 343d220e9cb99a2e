"""The whole model against transformers' Llama and Mixtral: where norms and residuals sit, the shift of the targets."""

import pytest
import torch
from helpers import assert_agreement, assert_nonzero, gradients, perturb, random_ids, seeded, tiny
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_lab import build_model

RENAMED = {
    "model.embed_tokens.": "embedding.",
    "model.norm.": "final_norm.",
    "lm_head.": "lm_heads.0.",
    "model.layers.": "layers.",
    ".input_layernorm.": ".seq_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
    ".self_attn.": ".seq_layer.",
    ".mlp.experts.": ".ffn.",
    ".mlp.": ".ffn.",
    ".ffn.gate.weight": ".ffn.router.mlp.gate.weight",
}


def in_our_names(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours = {}
    for name, tensor in theirs.items():
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if name.endswith("gate_up_proj"):
            ours[name.replace("gate_up", "gate")], ours[name.replace("gate_up", "up")] = tensor.chunk(2, dim=1)
        else:
            ours[name] = tensor
    return ours


def their_model(config):
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attn_implementation": "eager",
    }
    if not config.moe_layers:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=config.d_ff, **common))
    experts = {"num_local_experts": config.n_experts, "num_experts_per_tok": config.moe_top_k}
    sizes = {"intermediate_size": config.d_ff_expert, "experts_implementation": "eager", "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**common, **experts, **sizes))


@pytest.mark.parametrize("moe_layers", [(), (0, 1)], ids=["llama", "mixtral"])
def test_the_whole_model_agrees(moe_layers: tuple) -> None:
    config = tiny(moe_layers=moe_layers, moe_router_hidden=0, n_pred_tokens=1, aux_loss_weights=(1.0,))
    theirs = perturb(seeded(their_model, config)).eval()
    ours = build_model(config).eval()
    ours.load_state_dict(in_our_names(theirs.state_dict()))
    ids = random_ids(2, 30)
    expected = theirs(ids, labels=ids)
    loss = ours.losses(ids)["next_token"]
    assert_agreement({"logits": ours(ids).logits, "loss": loss}, {"logits": expected.logits, "loss": expected.loss})
    loss.backward()
    expected.loss.backward()
    assert_agreement(gradients(ours), in_our_names(gradients(theirs)))
    assert_nonzero(gradients(ours))
