"""What a run is: frozen dataclasses, one per YAML section, and the way from a file to them and back.

`help(moe_lab.config.ModelConfig)` prints the table of a section's fields (type, default, meaning, unit); the tables
are made from the fields themselves, so they cannot drift. A file may hold one section; what it leaves out has its
default; a key that no field has is an error. Every error is a `ConfigError` of one line that names the field.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

_beside = Path(__file__).resolve().parents[1]
# Of the checkout, so that paths never hang on the working directory; installed without one, that directory it is.
ROOT = _beside if (_beside / "pyproject.toml").exists() else Path.cwd()


class ConfigError(ValueError):
    """The user's input is wrong. One line: the field or file, the value, what to do."""


def option(default: Any, meaning: str, *, ge=None, gt=None, le=None, lt=None, choices: tuple | None = None) -> Any:
    """A dataclass field with its meaning and its range, checked for numbers and for each number in a list."""
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"meaning": meaning, "choices": choices, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    return field(default=default, metadata=metadata)


def section(name: str):
    """Freeze a dataclass, name its YAML section, and write its table of fields into its docstring."""

    def decorate(cls):
        cls = dataclass(frozen=True, kw_only=True)(cls)
        rows = [f"    {f.name}: {f.type} = {f.default!r}\n        {f.metadata['meaning']}" for f in fields(cls)]
        cls.__doc__ = f"{cls.__doc__}\n\nFields of the YAML section `{name}`:\n\n" + "\n".join(rows) + "\n"
        cls.section_name = name
        return cls

    return decorate


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
    moe_capacity_factor: float | None = option(
        None, "most tokens of an expert over the even share; None: no drops", gt=0
    )
    moe_balance_weight: float = option(0.01, "weight of the load-balance loss, summed over layers", ge=0)
    moe_z_weight: float = option(0.001, "weight of the router z-loss, summed over layers", ge=0)
    mod_enabled: bool = option(False, "Mixture-of-Depths around every sublayer")
    mod_capacity_factor: float = option(0.75, "share of a sequence's tokens that a sublayer computes", gt=0, le=1)
    mod_router_hidden: int = option(128, "hidden width of the MoD router and predictor; 0: linear ones", ge=0)
    mod_predictor_weight: float = option(
        0.01, "weight of the predictor's binary cross-entropy, mean over sublayers", ge=0
    )
    mamba_enabled: bool = option(False, "whether mamba_layers take Mamba in place of attention")
    mamba_layers: tuple[int, ...] = option((), "layers whose sequence sublayer is Mamba")
    ssm_state_dim: int = option(16, "state values per channel of Mamba (d_state)", gt=0)
    mamba_expand: int = option(2, "Mamba's inner width over d_model", gt=0)
    mamba_d_conv: int = option(4, "taps of Mamba's causal convolution", ge=2)
    mamba_dt_rank: int | None = option(
        None, "rank of Mamba's step-size projection; None: d_model / 16, rounded up", gt=0
    )
    mamba_kernel: str = option("torch", "who computes the scan", choices=("torch", "mamba_ssm"))
    n_pred_tokens: int = option(2, "prediction heads: t+1 … t+n", gt=0)
    aux_loss_weights: tuple[float, ...] = option((1.0, 0.5), "loss weight of each head, normalised to sum 1", ge=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.n_heads={self.n_heads} must divide model.d_model={self.d_model}, or set model.head_dim"
            )
        if self.width_of_head % 2:
            raise ConfigError(f"model.head_dim={self.width_of_head} must be even: rotary positions turn pairs")
        for name in ("moe_layers", "mamba_layers"):
            layers = getattr(self, name)
            for index in layers:
                if not 0 <= index < self.n_layers:
                    raise ConfigError(
                        f"model.{name}: layer {index} does not exist; n_layers={self.n_layers}, so 0 to {self.n_layers - 1}"
                    )
            if len(set(layers)) < len(layers):
                raise ConfigError(f"model.{name}={list(layers)} names a layer twice; name each once")
        if any(self.is_moe(layer) and not self.is_mamba(layer) for layer in range(self.n_layers)):
            for name in ("d_model", "d_ff_expert"):
                if getattr(self, name) % 8:
                    raise ConfigError(
                        f"model.{name}={getattr(self, name)} must be a multiple of 8 where there are experts: "
                        "grouped matrix products take rows of whole 16 bytes"
                    )
        if self.moe_top_k > self.n_experts:
            raise ConfigError(
                f"model.moe_top_k={self.moe_top_k} is more than model.n_experts={self.n_experts}; lower it"
            )
        if len(self.aux_loss_weights) != self.n_pred_tokens:
            raise ConfigError(
                f"model.aux_loss_weights has {len(self.aux_loss_weights)} values for model.n_pred_tokens="
                f"{self.n_pred_tokens}; give one for each head"
            )
        if not self.aux_loss_weights[0] > 0:
            raise ConfigError(
                f"model.aux_loss_weights[0]={self.aux_loss_weights[0]:g}: the next token's weight must be > 0"
            )
        if self.n_pred_tokens >= self.max_seq_len:
            raise ConfigError(
                f"model.n_pred_tokens={self.n_pred_tokens} needs windows longer than model.max_seq_len={self.max_seq_len}"
            )

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
    max_lr: float = option(
        0.01, "learning rate of Muon's matrices after warm-up (of everything, if type is adamw)", gt=0
    )
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

    def __post_init__(self) -> None:
        check_ranges(self)


@section("optimizer")
class OptimizerConfig:
    """Who moves the weights: Muon on matrices beside AdamW on the rest, or AdamW alone."""

    type: str = option(
        "muon", "muon: matrices by Muon, the rest by AdamW; adamw: everything", choices=("muon", "adamw")
    )
    momentum: float = option(0.95, "Muon's momentum", ge=0, lt=1)
    nesterov: bool = option(True, "Muon's momentum looks ahead")
    ns_steps: int = option(5, "Newton–Schulz iterations of Muon", gt=0)
    adjust_lr: str = option(
        "original", "the convention in which a Muon LR is a number", choices=("original", "match_rms_adamw")
    )
    adamw_lr_ratio: float = option(0.3, "AdamW's LR beside Muon over max_lr", gt=0)
    embedding_lr_ratio: float | None = option(
        None, "the same for embeddings and heads; None: they take adamw_lr_ratio", gt=0
    )
    betas: tuple[float, ...] = option((0.9, 0.95), "AdamW's two betas", ge=0, lt=1)
    eps: float = option(1e-8, "AdamW's epsilon", gt=0)
    weight_decay: float = option(0.01, "decay of matrices, embeddings and heads; nothing else decays", ge=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.betas) != 2:
            raise ConfigError(f"optimizer.betas={list(self.betas)} must be two numbers")


@section("precision")
class PrecisionConfig:
    """Number formats of what is kept and of what is computed."""

    parameters: str = option(
        "float32", "format of the weights; bfloat16 loses updates", choices=("float32", "bfloat16")
    )
    compute: str = option(
        "auto",
        "format of matrix products; auto: bfloat16 where it is 1.3 × faster",
        choices=("auto", "float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@section("data")
class DataConfig:
    """The text. A source that cannot be read is an error; nothing ever takes its place."""

    source: str = option(
        "stdlib", "stdlib, a file or folder of text, or hf:NAME for a Hugging Face data set (extra `online`)"
    )
    subset: str | None = option(None, "configuration of a Hugging Face data set")
    data_files: str | None = option(None, "files of a Hugging Face data set, such as data/*.parquet with hf:parquet")
    text_field: str = option("text", "column of a Hugging Face data set that holds the text")
    max_bytes: int | None = option(None, "stop reading after this much text, in bytes; required for hf:", gt=0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.source:
            raise ConfigError("data.source is empty; write stdlib, a path, or hf:NAME")
        if self.source.startswith("hf:") and self.max_bytes is None:
            raise ConfigError(
                f"data.max_bytes is needed with data.source={self.source}: how much text to take from the stream"
            )


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


def check_ranges(values: Any) -> None:
    """Raise ConfigError for the first field of a section whose type or range is wrong."""
    hints = typing.get_type_hints(type(values))
    for f in fields(values):
        where, value = f"{values.section_name}.{f.name}", getattr(values, f.name)
        check_type(where, value, hints[f.name])
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{where}={value!r} is not one of {', '.join(choices)}{suggestion(str(value), choices)}")
        numbers = value if isinstance(value, tuple) else [value]
        for name, bound in f.metadata["bounds"].items():
            holds = {
                "ge": lambda v, b: v >= b,
                "gt": lambda v, b: v > b,
                "le": lambda v, b: v <= b,
                "lt": lambda v, b: v < b,
            }
            sign = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}[name]
            if any(number is not None and not holds[name](number, bound) for number in numbers):
                raise ConfigError(f"{where}={show(value)} must be {sign} {bound}")


def check_type(where: str, value: Any, expected: Any) -> None:
    """Raise ConfigError unless `value` is of the annotated type. True is no number and "1e-3" is text."""
    if isinstance(expected, types.UnionType):
        if value is None:
            return
        expected = next(kind for kind in typing.get_args(expected) if kind is not type(None))
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(f"{where}={show(value)} must be a list, such as [1, 2]")
        for index, item in enumerate(value):
            check_type(f"{where}[{index}]", item, typing.get_args(expected)[0])
        return
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[expected]
    right = isinstance(value, (int, float) if expected is float else expected)
    if right and expected in (int, float):
        right = not isinstance(value, bool) and math.isfinite(value)
    if not right:
        hint = ""
        if expected in (int, float) and isinstance(value, str) and is_number(value):
            hint = f"; it is text, since YAML wants a point in an exponent: write {plain(value)}"
        raise ConfigError(f"{where}={show(value)} must be {wanted}{hint}")


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def plain(text: str) -> str:
    """The number of `text` in a form that YAML reads as a number: 1e-3 becomes 0.001."""
    shown = repr(float(text))
    return shown if "e" not in shown or "." in shown else shown.replace("e", ".0e")


def show(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; a config must not."""

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or "\n" in key_node.value:
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} stands here and in line {seen[key_node.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def from_dict(values: Any, origin: str = "config") -> Config:
    """Build a Config from nested dicts, as `to_dict` gives them. Raises ConfigError; `origin` starts its messages."""
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected sections such as `model:`, got {type(values).__name__}")
    kinds = {f.name: f.default_factory for f in fields(Config)}
    parts = {}
    for name, entries in values.items():
        if name not in kinds:
            raise ConfigError(f"{origin}: unknown section {name!r}{suggestion(str(name), kinds)}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{origin}: section {name} must hold keys and values, got {show(entries)}")
        known = [f.name for f in fields(kinds[name])]
        for key in entries:
            if key not in known:
                raise ConfigError(f"{origin}: unknown key {name}.{key}{suggestion(str(key), known)}")
        entries = {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}
        try:
            parts[name] = kinds[name](**entries)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
    return Config(**parts)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain Python values: what config.yaml and a checkpoint hold."""
    return {
        name: {key: list(value) if isinstance(value, tuple) else value for key, value in part.items()}
        for name, part in asdict(config).items()
    }


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def read_yaml(path: str | Path) -> Any:
    """Parse one YAML file. Raises ConfigError: missing, not a file, not UTF-8, bad YAML (with its line), empty."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such file{f'; did you mean {path.parent / near[0]}?' if near else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise ConfigError(f"{path}: the file is empty; a config holds sections such as `model:`")
    return values


def parse_override(text: str) -> tuple[str, str, Any]:
    """`training.steps=200` → ("training", "steps", 200). Here, on a command line, 1e-3 is a number."""
    path, equals, value = text.partition("=")
    name, dot, key = path.strip().partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"override {text!r} must read section.key=value, such as training.steps=200")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from None
    if isinstance(parsed, str) and is_number(parsed):
        parsed = float(parsed)
    return name, key, parsed


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read one YAML file, apply overrides such as `training.steps=200`, validate. Raises ConfigError."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r} must be a list of texts, such as [{overrides!r}]")
    values = read_yaml(path)
    from_dict(values, str(path))  # the file must be right by itself, so that its errors carry its name
    for text in overrides:
        name, key, value = parse_override(text)
        values.setdefault(name, {})[key] = value
    return from_dict(values, "override" if overrides else str(path))


def differences(old: Config, new: Config) -> list[str]:
    """`section.key: old → new` for every field that differs."""
    before, after = to_dict(old), to_dict(new)
    return [
        f"{name}.{key}: {before[name][key]} → {after[name][key]}"
        for name in before
        for key in before[name]
        if before[name][key] != after[name][key]
    ]
