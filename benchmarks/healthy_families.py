"""Every family of transformers that runs here in tiny random form: language models on the corpus' bytes, pictures, sounds.

A family is made from its own config class: each size that the class knows by one of the names below becomes a small one, EXTRA
holds what else a family asks for, and a model that is still large is left out with its size as the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

from benchmarks.programs import Make, Masked, Program, Rows, update

transformers.logging.set_verbosity_error()
LARGEST = 3_000_000  # parameters: what is larger is not tiny
LR = 2e-3  # AdamW's for models of this width; OTHER_LRS where a sweep of 5e-4, 2e-3 and 8e-3 found another one better
WARMUP = 10

SIZES: dict[int, str] = {
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_shared_experts num_nextn_predict_layers",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers "
    "num_key_value_heads num_experts_per_tok moe_topk moe_top_k moe_k mamba_expand linear_num_key_heads num_blocks",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads num_kv_heads",
    8: "qk_nope_head_dim state_size mamba_d_state mamba_n_heads",
    16: "head_dim d_kv q_lora_rank kv_lora_rank v_head_dim mamba_d_head linear_key_head_dim linear_value_head_dim rotary_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size sliding_window window_size attention_window",
    64: "hidden_size d_model n_embd dim embed_dim n_embed emb_dim word_embed_dim embedding_size lru_width decoder_hidden_size",
    128: "intermediate_size ffn_dim d_ff n_inner hidden_dim d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "max_position_embeddings n_positions n_ctx max_seq_len",
    256: "vocab_size",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | {"qk_rope_head_dim": 8}
# byte 0 is in no text; training needs no cache
PLAIN = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
MLA = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4}
HYBRID = {"num_hidden_layers": 4}
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "youtu"], MLA),
    **dict.fromkeys(["bailing_hybrid", "lfm3", "qwen3_next"], HYBRID),
    "bamba": {"attn_layer_indices": [1], **HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, **HYBRID},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (32, 32), "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 4, "feed_forward_size": 128,
                 "attention_head_size": 16},
    "funnel": {"block_sizes": [1, 1], "d_inner": 128, "d_head": 16},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "cpmant": {"dim_ff": 128, "prompt_length": 4},
    "minicpm3": {"scale_emb": 1, "dim_model_base": 64},
    "xlm": {"causal": True},
}  # fmt: skip
OTHER_LRS: dict[str, float] = {}
# whose loss is not shifted, as of translators' decoders: the labels they are given must be the next tokens
UNSHIFTED = [
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "trocr",
    "whisper",
    "xlm",
]


def small(kind: str) -> Any:
    """A family's config with every size that it knows made small."""
    cls = CONFIG_MAPPING[kind]
    defaults = cls()
    known = {name for name in SMALL if hasattr(defaults, name)} - fixed_properties(cls)
    # experts without their balance loss collapse: it is in the loss where the router's logits are asked for
    balanced = {"output_router_logits": True} if hasattr(defaults, "output_router_logits") else {}
    sizes = {name: SMALL[name] for name in known} | balanced | PLAIN | EXTRA.get(kind, {})
    return cls(**sizes)


def fixed_properties(cls: type) -> set[str]:
    """Names that the class computes and cannot be told."""
    return {name for name, value in inspect.getmembers(cls) if isinstance(value, property) and value.fset is None}


def built(kind: str, name: str, **changes: Any) -> nn.Module:
    """Raises ValueError for a model that is not tiny."""
    config = small(kind)
    for key, value in changes.items():
        setattr(config, key, value)
    cls = getattr(transformers, name)
    with torch.device("meta"):
        n = sum(p.numel() for p in cls(config).parameters())
    if n > LARGEST:
        raise ValueError(f"{n:,} parameters with all the sizes known to this table")
    return cls(config).train()


def trained_on(model: nn.Module, batches: Callable[[], dict[str, Tensor]], lr: float) -> Program:
    """AdamW with decoupled decay of matrices, a linear warm-up, clipping at 1: what most scripts for transformers do."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARMUP))

    def step(i: int) -> Tensor:
        loss = update(optimizer, model(**batches()).loss)
        schedule.step()
        return loss

    return Program(model, [optimizer], step, (batches(), None))


def causal(kind: str, name: str, seed: int) -> Program:
    rows, ahead = Rows(seed, batch=4, length=65), int(kind in UNSHIFTED)

    def batch() -> dict[str, Tensor]:
        ids = rows()
        return {"input_ids": ids[:, :64].contiguous(), "labels": ids[:, ahead : 64 + ahead].contiguous()}

    return trained_on(built(kind, name, is_decoder=True), batch, OTHER_LRS.get(f"causal {kind}", LR))


def masked(kind: str, name: str, seed: int) -> Program:
    return trained_on(built(kind, name), Masked(seed, batch=8), OTHER_LRS.get(f"masked {kind}", LR))


def sequences(kind: str, name: str, seed: int) -> Program:
    """Encoder and decoder: bytes with holes in, whole ones out."""
    rows = Masked(seed)

    def batch() -> dict[str, Tensor]:
        holes = rows()
        return {
            "input_ids": holes["input_ids"],
            "labels": holes["input_ids"].where(holes["labels"] < 0, holes["labels"]),
        }

    model = built(kind, name, pad_token_id=0, decoder_start_token_id=0)
    return trained_on(model, batch, OTHER_LRS.get(f"sequences {kind}", LR))


def tables() -> dict[str, tuple[Callable, dict[str, Any]]]:
    return {
        "causal": (causal, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "masked": (masked, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        "sequences": (sequences, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    }


def programs() -> Iterator[tuple[str, Make]]:
    """Name and maker of each family, a class of models once."""
    for task, (make, names) in tables().items():
        seen = set()
        for kind, name in names.items():
            name = name[0] if isinstance(name, (tuple, list)) else name
            if name not in seen:
                seen.add(name)
                yield f"{task} {kind}", partial(make, kind, name)
