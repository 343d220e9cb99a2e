"""What a run is: a frozen dataclass for each YAML section, how they are read from a file, and written.

A field's type holds its range and its comment is its meaning; `help(moe_lab.config.ModelConfig)` prints both.
A file may hold one section; what it leaves out has its default; a key that no field has is an error. Every
error is a `ConfigError` of one line that names the field.
"""

import json
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from moe_lab.sections import GONE as GONE  # for rooms that know this file alone
from moe_lab.sections import ConfigError, Dumper, build, parse_word, read_yaml, section
from moe_lab.sections import check_value as check_value


def root_of(package: Path) -> Path:
    """The checkout that a package lies in, from whichever directory it is used; else the working directory."""
    beside = package.resolve().parent
    is_checkout = (beside / "pyproject.toml").is_file() and (beside / "configs").is_dir()
    return beside if is_checkout else Path.cwd()


ROOT = root_of(Path(__file__).parent)

Count = Annotated[int, "> 0"]
CountOrZero = Annotated[int, ">= 0"]
TwoOrMore = Annotated[int, ">= 2"]
Positive = Annotated[float, "> 0"]
NonNegative = Annotated[float, ">= 0"]
ShareBelow1 = Annotated[float, ">= 0", "< 1"]
Layers = tuple[int, ...]


@section
class ModelConfig:
    """The network. Layer indices count from 0; `None` means: follow from the other fields."""

    vocab_size: Annotated[int, ">= 257"] = 4096  # tokens; shrinks to what a small text yields
    d_model: Count = 192  # width of the residual stream
    n_layers: Count = 4  # blocks, each a sequence sublayer and a feed-forward sublayer
    n_heads: Count = 6  # query heads of attention
    n_kv_heads: Count = 2  # key and value heads; must divide n_heads
    head_dim: Count | None = None  # width of a head, even; None: d_model / n_heads
    d_ff: Count = 512  # hidden width of a dense SwiGLU
    max_seq_len: TwoOrMore = 256  # tokens in a training window; generation may reach no further
    rope_theta: Positive = 10000.0  # base of the rotary frequencies
    norm_eps: Positive = 1e-5  # epsilon of every RMSNorm
    dropout: ShareBelow1 = 0.0  # share of a sublayer's output dropped in training
    init_std: Positive = 0.02  # standard deviation of the matrices' start values
    zero_init_output: bool = False  # start each sublayer's last matrix at 0: it begins by adding nothing
    moe_layers: Layers = ()  # layers with experts; one that is also Mamba is a Routing Mamba
    n_experts: TwoOrMore = 8  # experts of an MoE layer
    moe_top_k: Count = 2  # experts that a token is sent to
    d_ff_expert: Count = 256  # hidden width of one expert
    moe_router_hidden: CountOrZero = 128  # hidden width of the MLP router; 0: a linear router
    moe_balance_weight: NonNegative = 0.01  # weight of the load-balance loss, summed over layers
    moe_z_weight: NonNegative = 0.001  # weight of the router z-loss, summed over layers
    mod_enabled: bool = False  # Mixture-of-Depths around every sublayer
    mod_capacity_factor: Annotated[float, "> 0", "<= 1"] = 0.75  # share of tokens computed
    mod_router_hidden: CountOrZero = 128  # hidden width of MoD's router and predictor; 0: linear
    mod_predictor_weight: NonNegative = 0.01  # weight of predictors' BCE, mean over sublayers
    mamba_enabled: bool = False  # whether mamba_layers take Mamba in place of attention
    mamba_layers: Layers = ()  # layers whose sequence sublayer is Mamba
    ssm_state_dim: Count = 16  # state values per channel of Mamba (d_state)
    mamba_expand: Count = 2  # Mamba's inner width over d_model
    mamba_d_conv: TwoOrMore = 4  # taps of Mamba's causal convolution
    mamba_dt_rank: Count | None = None  # rank of Mamba's step-size projection; None: ⌈d_model / 16⌉
    n_pred_tokens: Count = 2  # prediction heads: t+1 … t+n
    aux_loss_weights: tuple[NonNegative, ...] = (1.0, 0.5)  # weight of each head; made to sum to 1

    def conflicts(self) -> Iterator[str]:
        if self.n_heads % self.n_kv_heads:
            yield f"n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}"
        if self.head_dim is None and self.d_model % self.n_heads:
            yield f"n_heads={self.n_heads} must divide model.d_model={self.d_model}, or set model.head_dim"
        if self.width_of_head % 2:
            yield f"head_dim={self.width_of_head} must be even: rotary positions turn pairs"
        for name in ("moe_layers", "mamba_layers"):
            layers, n = getattr(self, name), self.n_layers
            for layer in set(layers) - set(range(n)):
                yield f"{name}: layer {layer} does not exist; n_layers={n}, so 0 to {n - 1}"
            if len(set(layers)) < len(layers):
                yield f"{name}={list(layers)} names a layer twice; name each once"
        experts = [layer for layer in self.moe_layers if not self.is_mamba(layer)]
        for name in ("d_model", "d_ff_expert"):
            if experts and getattr(self, name) % 8:
                why = "where there are experts: grouped matrix products take rows of whole 16 bytes"
                yield f"{name}={getattr(self, name)} must be a multiple of 8 {why}"
        if self.moe_top_k > self.n_experts:
            yield f"moe_top_k={self.moe_top_k} is more than model.n_experts={self.n_experts}"
        n, n_weights = self.n_pred_tokens, len(self.aux_loss_weights)
        if n_weights != n:
            yield f"aux_loss_weights has {n_weights} values for model.n_pred_tokens={n}; give one for each head"
        elif not self.aux_loss_weights[0]:
            yield "aux_loss_weights[0]=0: the next token's weight must be more than 0"
        if n >= self.max_seq_len:
            yield f"n_pred_tokens={n} must be less than model.max_seq_len={self.max_seq_len}"

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def dt_rank(self) -> int:
        return self.mamba_dt_rank or math.ceil(self.d_model / 16)

    def is_mamba(self, layer: int) -> bool:
        return self.mamba_enabled and layer in self.mamba_layers


@section
class TrainingConfig:
    """The run. A step is one optimizer update; micro-batches are never counted."""

    steps: Count | None = None  # optimizer updates; None: as many as total_tokens takes, or 1000
    total_tokens: Count | None = None  # tokens to train on, used where steps is not given
    batch_size: Count = 8  # windows in a micro-batch
    gradient_accumulation_steps: Count = 1  # micro-batches in a step
    max_lr: Positive = 0.01  # LR of Muon's matrices after warm-up; with adamw, of all
    min_lr_ratio: Annotated[float, ">= 0", "<= 1"] = 0.1  # share of max_lr at which the cosine ends
    warmup_steps: CountOrZero = 20  # steps of linear warm-up; step n runs at n / warmup_steps
    max_grad_norm: Positive = 1.0  # gradients are scaled down to this norm
    log_interval: Count = 10  # steps between fetches of the readings from the device
    eval_interval: Count = 200  # steps between evaluations; one more at step 0 and at the end
    save_interval: Count = 200  # steps between checkpoints; one more at the end
    keep_checkpoints: Count = 2  # newest checkpoints kept
    activation_checkpointing: bool = False  # recompute blocks backward: less memory
    compile: bool = False  # losses through torch.compile, which needs a C++ compiler
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA, else MPS, else CPU
    seed: Annotated[int, ">= 0", "< 2147483648"] = 0  # of start values, data order, dropout


@section
class OptimizerConfig:
    """Who moves the weights: Muon on matrices beside AdamW on the rest, or AdamW alone."""

    type: Literal["muon", "adamw"] = "muon"  # muon: AdamW for what is no matrix
    momentum: ShareBelow1 = 0.95  # Muon's momentum
    nesterov: bool = True  # Muon's momentum looks ahead
    ns_steps: Count = 5  # Newton–Schulz iterations of Muon
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"  # the convention of Muon's LR
    adamw_lr_ratio: Positive = 0.3  # AdamW's LR beside Muon over max_lr
    embedding_lr_ratio: Positive | None = None  # of embeddings and heads; None: adamw_lr_ratio
    betas: tuple[ShareBelow1, ...] = (0.9, 0.95)  # AdamW's two betas
    eps: Positive = 1e-8  # AdamW's epsilon
    weight_decay: NonNegative = 0.01  # decay of matrices, embeddings and heads; nothing else decays

    def conflicts(self) -> Iterator[str]:
        if len(self.betas) != 2:
            yield f"betas={list(self.betas)} must be two numbers"


@section
class PrecisionConfig:
    """Number formats of the weights and of matrix products."""

    parameters: Literal["float32", "bfloat16"] = "float32"  # bfloat16 loses updates
    compute: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where 1.3 × faster


@section
class DataConfig:
    """The text. A source that cannot be read is an error; nothing ever takes its place."""

    source: str = "stdlib"  # stdlib, a text file or folder, or hf:NAME (extra `online`)
    subset: str | None = None  # configuration of a Hugging Face data set
    data_files: str | None = None  # files of it, such as data/*.parquet with hf:parquet
    text_field: str = "text"  # its column that holds the text
    max_bytes: Count | None = None  # stop reading after this much text, in bytes; required for hf:

    def conflicts(self) -> Iterator[str]:
        if self.source in ("", "hf:"):
            yield f"source={self.source} names no text; write stdlib, a path, or hf:NAME"
        if self.source.startswith("hf:") and self.max_bytes is None:
            yield f"max_bytes is needed with data.source={self.source}: how much text to take"


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, as its `config.yaml` says it."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()

    @property
    def tokens_per_step(self) -> int:
        training = self.training
        return training.batch_size * training.gradient_accumulation_steps * self.model.max_seq_len

    @property
    def n_steps(self) -> int:
        """Updates of the run; the last one may go past `total_tokens`, by less than one step."""
        if self.training.steps or self.training.total_tokens is None:
            return self.training.steps or 1000
        return math.ceil(self.training.total_tokens / self.tokens_per_step)

    def with_(self, **changes: dict[str, Any]) -> "Config":
        """A variation, validated again: `with_(training={"steps": 20}, model={"dropout": 0.1})`."""
        parts = {name: replace(getattr(self, name), **new) for name, new in changes.items()}
        return replace(self, **parts)


SECTIONS = typing.get_type_hints(Config)  # class by name


def from_dict(values: Any, origin: str = "config") -> Config:
    """A Config from nested dicts, as of `to_dict`. Raises ConfigError; `origin` starts its message."""
    try:
        return build(Config, values)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A YAML file's config, with overrides such as `training.steps=200`. Raises ConfigError."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r} must be a list of texts: [{overrides!r}]")
    values = to_dict(from_dict(read_yaml(path), str(path)))  # right by itself: its errors carry its name
    for text in overrides:
        place, equals, value = text.partition("=")
        name, dot, key = place.strip().partition(".")
        origin = f"override {text!r}"
        if not (equals and dot and key):
            raise ConfigError(f"{origin} must read section.key=value, such as training.steps=200")
        hint = SECTIONS[name].hints.get(key) if name in SECTIONS else None
        values.setdefault(name, {})[key] = parse_word(value.strip(), hint, origin)
    return from_dict(values, "override")


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain Python values: what config.yaml and a checkpoint hold."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: Config) -> str:
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def differences(old: Config, new: Config) -> list[str]:
    """`section.key: old → new` for every field that differs."""
    after = to_dict(new)
    fields = [(name, key, value) for name, values in to_dict(old).items() for key, value in values.items()]
    return [f"{s}.{key}: {value} → {after[s][key]}" for s, key, value in fields if value != after[s][key]]
