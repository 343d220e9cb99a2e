"""What a run is: frozen dataclasses, one per YAML section. How they are read, checked and written is in `sections.py`.

`help(moe_lab.config.ModelConfig)` prints the table of a section's fields (type, default, meaning, unit), made from the
fields themselves, so that it cannot drift. A file may hold one section; what it leaves out has its default; a key that
no field has is an error. Every error is a `ConfigError` of one line that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moe_lab import sections
from moe_lab.sections import ConfigError, differences, option, read_yaml, section, suggestion, to_dict, to_yaml

__all__ = ["ROOT", "Config", "ModelConfig", "TrainingConfig", "OptimizerConfig", "PrecisionConfig", "DataConfig"]
__all__ += ["ConfigError", "differences", "from_dict", "load_config", "read_yaml", "suggestion", "to_dict", "to_yaml"]


def root_of(package: Path) -> Path:
    """The checkout that a package lies in, so that paths never hang on the working directory; else that directory."""
    beside = package.resolve().parent
    return beside if (beside / "pyproject.toml").is_file() and (beside / "configs").is_dir() else Path.cwd()


ROOT = root_of(Path(__file__).parent)


@section("model")
class ModelConfig:
    """The network. Layer indices count from 0; `None` means: follow from the other fields."""

    vocab_size: int = option(4096, "tokens in the vocabulary; shrinks to what a small text yields", ge=257)
    d_model: int = option(192, "width of the residual stream", gt=0)
    n_layers: int = option(4, "blocks, each a sequence sublayer and a feed-forward sublayer", gt=0)
    n_heads: int = option(6, "query heads of attention", gt=0)
    n_kv_heads: int = option(2, "key and value heads; must divide n_heads", gt=0)
    head_dim: int | None = option(None, "width of a head, even; None: d_model / n_heads", gt=0)
    d_ff: int = option(512, "hidden width of a dense SwiGLU", gt=0)
    max_seq_len: int = option(256, "tokens in a training window, and the most that generation may reach", ge=2)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", gt=0)
    norm_eps: float = option(1e-5, "epsilon of every RMSNorm", gt=0)
    dropout: float = option(0.0, "share of a sublayer's output dropped in training", ge=0, lt=1)
    init_std: float = option(0.02, "standard deviation of the matrices' start values", gt=0)
    moe_layers: tuple[int, ...] = option((), "layers with experts; one that is also a Mamba layer is a Routing Mamba")
    n_experts: int = option(8, "experts of an MoE layer", ge=2)
    moe_top_k: int = option(2, "experts that a token is sent to", gt=0)
    d_ff_expert: int = option(256, "hidden width of one expert", gt=0)
    moe_router_hidden: int = option(128, "hidden width of the MLP router; 0: a linear router", ge=0)
    moe_capacity_factor: float | None = option(None, "most tokens per expert over the even share; None: no drops", gt=0)
    moe_balance_weight: float = option(0.01, "weight of the load-balance loss, summed over layers", ge=0)
    moe_z_weight: float = option(0.001, "weight of the router z-loss, summed over layers", ge=0)
    mod_enabled: bool = option(False, "Mixture-of-Depths around every sublayer")
    mod_capacity_factor: float = option(0.75, "share of a sequence's tokens that a sublayer computes", gt=0, le=1)
    mod_router_hidden: int = option(128, "hidden width of the MoD router and predictor; 0: linear ones", ge=0)
    mod_predictor_weight: float = option(0.01, "weight of predictors' binary cross-entropy, mean over sublayers", ge=0)
    mamba_enabled: bool = option(False, "whether mamba_layers take Mamba in place of attention")
    mamba_layers: tuple[int, ...] = option((), "layers whose sequence sublayer is Mamba")
    ssm_state_dim: int = option(16, "state values per channel of Mamba (d_state)", gt=0)
    mamba_expand: int = option(2, "Mamba's inner width over d_model", gt=0)
    mamba_d_conv: int = option(4, "taps of Mamba's causal convolution", ge=2)
    mamba_dt_rank: int | None = option(None, "rank of Mamba's step-size projection; None: ⌈d_model / 16⌉", gt=0)
    mamba_kernel: str = option("torch", "who computes the scan", choices=("torch", "mamba_ssm"))
    n_pred_tokens: int = option(2, "prediction heads: t+1 … t+n", gt=0)
    aux_loss_weights: tuple[float, ...] = option((1.0, 0.5), "loss weight of each head, normalised to sum 1", ge=0)

    def conflicts(self) -> Iterator[str]:
        if self.n_heads % self.n_kv_heads:
            yield f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}"
        if self.head_dim is None and self.d_model % self.n_heads:
            yield f"model.n_heads={self.n_heads} must divide model.d_model={self.d_model}, or set model.head_dim"
        if self.width_of_head % 2:
            yield f"model.head_dim={self.width_of_head} must be even: rotary positions turn pairs"
        for name in ("moe_layers", "mamba_layers"):
            layers = getattr(self, name)
            for index in sorted(set(layers) - set(range(self.n_layers))):
                yield f"model.{name}: layer {index} does not exist; n_layers={self.n_layers}, so 0 to {self.n_layers - 1}"
            if len(set(layers)) < len(layers):
                yield f"model.{name}={list(layers)} names a layer twice; name each once"
        odd = [name for name in ("d_model", "d_ff_expert") if getattr(self, name) % 8]
        if odd and any(self.is_moe(layer) and not self.is_mamba(layer) for layer in range(self.n_layers)):
            why = "where there are experts: grouped matrix products take rows of whole 16 bytes"
            yield f"model.{odd[0]}={getattr(self, odd[0])} must be a multiple of 8 {why}"
        if self.moe_top_k > self.n_experts:
            yield f"model.moe_top_k={self.moe_top_k} is more than model.n_experts={self.n_experts}; lower it"
        weights, n = self.aux_loss_weights, self.n_pred_tokens
        if len(weights) != n:
            yield f"model.aux_loss_weights has {len(weights)} values for model.n_pred_tokens={n}; give one for each head"
        if not weights[0] > 0:
            yield f"model.aux_loss_weights[0]={weights[0]:g}: the next token's weight must be > 0"
        if n >= self.max_seq_len:
            yield f"model.n_pred_tokens={n} needs windows longer than model.max_seq_len={self.max_seq_len}"

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def dt_rank(self) -> int:
        return self.mamba_dt_rank or math.ceil(self.d_model / 16)

    def is_mamba(self, layer: int) -> bool:
        return self.mamba_enabled and layer in self.mamba_layers

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers


@section("training")
class TrainingConfig:
    """The run. A step is one optimizer update; micro-batches are never counted."""

    steps: int | None = option(None, "optimizer updates; None: as many as total_tokens takes, or 1000", gt=0)
    total_tokens: int | None = option(None, "tokens to train on, used where steps is not given", gt=0)
    batch_size: int = option(8, "windows in a micro-batch", gt=0)
    gradient_accumulation_steps: int = option(1, "micro-batches in a step", gt=0)
    max_lr: float = option(0.01, "learning rate of Muon's matrices after warm-up (of all, if type is adamw)", gt=0)
    min_lr_ratio: float = option(0.1, "share of max_lr at which the cosine ends", ge=0, le=1)
    warmup_steps: int = option(20, "steps of linear warm-up; step n runs at n / warmup_steps", ge=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", gt=0)
    log_interval: int = option(10, "steps between fetches of the readings from the device", gt=0)
    eval_interval: int = option(200, "steps between evaluations; one more at step 0 and at the end", gt=0)
    save_interval: int = option(200, "steps between checkpoints; one more at the end", gt=0)
    keep_checkpoints: int = option(2, "newest checkpoints kept", gt=0)
    activation_checkpointing: bool = option(False, "recompute each block in the backward pass: less memory, more time")
    device: str = option("auto", "auto takes CUDA, else MPS, else the CPU", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = option(0, "start values, data order and dropout follow from it", ge=0, lt=2**31)


@section("optimizer")
class OptimizerConfig:
    """Who moves the weights: Muon on matrices beside AdamW on the rest, or AdamW alone."""

    type: str = option("muon", "muon: matrices by Muon, rest by AdamW; adamw: everything", choices=("muon", "adamw"))
    momentum: float = option(0.95, "Muon's momentum", ge=0, lt=1)
    nesterov: bool = option(True, "Muon's momentum looks ahead")
    ns_steps: int = option(5, "Newton–Schulz iterations of Muon", gt=0)
    adjust_lr: str = option("original", "the convention of Muon's LR", choices=("original", "match_rms_adamw"))
    adamw_lr_ratio: float = option(0.3, "AdamW's LR beside Muon over max_lr", gt=0)
    embedding_lr_ratio: float | None = option(None, "the same for embeddings and heads; None: adamw_lr_ratio", gt=0)
    betas: tuple[float, ...] = option((0.9, 0.95), "AdamW's two betas", ge=0, lt=1)
    eps: float = option(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = option(0.01, "decay of matrices, embeddings and heads; nothing else decays", ge=0)

    def conflicts(self) -> Iterator[str]:
        if len(self.betas) != 2:
            yield f"optimizer.betas={list(self.betas)} must be two numbers"


@section("precision")
class PrecisionConfig:
    """Number formats of what is kept and of what is computed."""

    parameters: str = option("float32", "format of weights; bfloat16 loses updates", choices=("float32", "bfloat16"))
    compute: str = option(
        "auto", "format of matrix products; auto: bfloat16 where 1.3 × faster", choices=("auto", "float32", "bfloat16")
    )


@section("data")
class DataConfig:
    """The text. A source that cannot be read is an error; nothing ever takes its place."""

    source: str = option("stdlib", "stdlib, a text file or folder, or hf:NAME on Hugging Face (extra `online`)")
    subset: str | None = option(None, "configuration of a Hugging Face data set")
    data_files: str | None = option(None, "files of a Hugging Face data set, such as data/*.parquet with hf:parquet")
    text_field: str = option("text", "column of a Hugging Face data set that holds the text")
    max_bytes: int | None = option(None, "stop reading after this much text, in bytes; required for hf:", gt=0)

    def conflicts(self) -> Iterator[str]:
        if not self.source:
            yield "data.source is empty; write stdlib, a path, or hf:NAME"
        if self.source.startswith("hf:") and self.max_bytes is None:
            yield f"data.max_bytes is needed with data.source={self.source}: how much text to take from the stream"


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, as its `config.yaml` says it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_size * self.training.gradient_accumulation_steps * self.model.max_seq_len

    @property
    def n_steps(self) -> int:
        """Optimizer updates of the whole run; the last step may go past `total_tokens` by less than one step."""
        if self.training.steps or self.training.total_tokens is None:
            return self.training.steps or 1000
        return math.ceil(self.training.total_tokens / self.tokens_per_step)

    def with_(self, **changes: dict[str, Any]) -> Config:
        """A variation: `config.with_(training={"steps": 20}, model={"dropout": 0.1})`, validated again."""
        return replace(self, **{name: replace(getattr(self, name), **values) for name, values in changes.items()})


def from_dict(values: Any, origin: str = "config") -> Config:
    """Build a Config from nested dicts, as `to_dict` gives them. Raises ConfigError; `origin` starts its messages."""
    return sections.build(Config, values, origin)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read one YAML file, apply overrides such as `training.steps=200`, validate. Raises ConfigError."""
    return sections.load(Config, path, overrides)
