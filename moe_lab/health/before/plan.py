"""What a config plans, read off its keys, by whichever name a project calls them: sizes, optimizers, LRs."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..conventions import CONVENTIONS, Group

# key → what other projects call it; the first one that a config holds counts
ALIASES: dict[str, tuple[str, ...]] = {
    "d_model": ("hidden_size", "n_embd", "dim", "model_dim", "embed_dim"),
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "n_kv_head", "num_kv_heads"),
    "d_ff": ("intermediate_size", "ffn_dim", "ffn_hidden_size"),
    "d_ff_expert": ("moe_intermediate_size",),
    "n_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "vocab_size": ("padded_vocab_size", "n_vocab"),
    "max_seq_len": ("block_size", "seq_len", "sequence_length", "max_length", "context_length"),
    "init_std": ("initializer_range",),
    "batch_size": ("micro_batch_size", "per_device_train_batch_size"),
    "gradient_accumulation_steps": ("grad_accum_steps", "n_accum", "accumulation_steps"),
    "steps": (
        *("max_steps", "n_steps", "num_steps", "total_steps", "max_iters", "train_iters"),
        *("max_train_steps", "num_train_steps"),
    ),
    "total_tokens": ("max_tokens", "train_tokens", "token_budget"),
    "warmup_steps": (
        "num_warmup_steps",
        "warmup_iters",
        "lr_warmup_iters",
        "lr_warmup_steps",
        "warmup_updates",
        "warmup_num_steps",
    ),
    "epochs": ("num_epochs", "n_epochs", "max_epochs", "total_epochs", "num_train_epochs", "train_epochs"),
    "warmup_ratio": ("warmup_proportion", "warmup_fraction"),
    "T_max": ("t_max",),
    "milestones": ("lr_steps", "lr_milestones", "decay_epochs", "lr_decay_epochs"),
    "warmup_epochs": ("num_warmup_epochs", "warm_up_epochs", "lr_warmup_epochs"),
    "decay_steps": ("lr_decay_iters", "lr_decay_steps", "cosine_steps", "max_decay_steps", "total_num_steps"),
    "min_lr": ("lr_min", "minimum_lr", "eta_min", "end_lr"),  # AdaBound's final_lr is SGD's
    "min_lr_ratio": ("min_lr_rate", "end_lr_ratio", "final_lr_ratio"),
    "log_interval": ("logging_steps", "log_every", "log_every_n_steps", "log_freq", "log_steps"),
    "eval_interval": ("eval_steps", "eval_every", "eval_freq", "evaluation_interval"),
    "save_interval": ("save_steps", "save_every", "save_freq", "checkpoint_interval", "checkpoint_every"),
    "adjust_lr": ("adjust_lr_fn",),
    "betas": ("adam_betas", "adamw_betas"),
}
FAMILIES = ("muon", "adam", "sgd", "lion", "adafactor", "sophia", "shampoo", "soap", "lamb", "rmsprop", "adagrad")
PEAK_LR = re.compile(r"(?!(?:\w+_)?(?:min|final|end|init|warmup|adjust|decay)_)(?:\w+_)?(?:lr|learning_rate)")
RATIO = re.compile(r"(?:adamw?|embed\w*)_lr_(?:ratio|scale|multiplier)")  # an LR of Adam's, as a share of Muon's
UNLIKE_MATRICES = re.compile(r"embed|head|scalar|bias|vector")  # their own LR, a hundred times another's, can be right
NOT_FROM_SCRATCH = re.compile(r"pretrained|finetune|fine_tune|from_checkpoint|init_from|load_from|lora|peft|adapter")
OFF = ("", "0", "none", "null", "~", "false", "no", "off", "scratch")


class Entry(NamedTuple):
    """One key of a config with a plain value."""

    path: tuple[str, ...]  # ("training", "max_lr")
    value: Any  # a scalar or a list of scalars; of a file as texts, so that nothing in it is constructed
    where: str  # file:line, or the key's name where the config is no file
    line: str = ""  # as it stands in the file
    comments: tuple[str, ...] = ()  # right above it, and beside it; without the #

    @property
    def name(self) -> str:
        return ".".join(self.path)


def as_number(value: Any) -> float:
    """A finite number, also one that YAML takes for text (3e-4); NaN for everything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def family(name: str) -> str | None:
    """`adam` for adamw_torch_fused, `muon` for Muon; the first of FAMILIES that the name holds, or None."""
    return next((known for known in FAMILIES if known in name.lower()), None)


class Plan:
    """A config's entries and the questions that the rules ask. Answers are None where the keys do not tell."""

    def __init__(self, entries: Sequence[Entry], aliases: Mapping[str, Sequence[str]] = ALIASES):
        self.entries, self.aliases = entries, aliases
        self.by_key = {entry.path[-1]: entry for entry in reversed(entries)}  # the first of each

    def find(self, key: str) -> Entry | None:
        """The first entry of that key, at any depth, or of one of its aliases."""
        names = (key, *self.aliases.get(key, ()))
        return next((self.by_key[name] for name in names if name in self.by_key), None)

    def is_training(self) -> bool:
        """Whether any key is one of a training config."""
        keys = set(self.by_key)
        known = any(self.find(key) for key in self.aliases) or any(map(PEAK_LR.fullmatch, map(str.lower, keys)))
        return known or self.optimizer() is not None or bool(keys & {"params_dtype", "param_dtype", "torch_dtype"})

    def number(self, key: str) -> float | None:
        """A number of at least 0."""
        entry = self.find(key)
        number = as_number(entry.value) if entry else math.nan
        return number if number >= 0 else None

    def numbers(self, key: str) -> list[float]:
        """Those of a list; none where it is no list of numbers."""
        entry = self.find(key)
        values = [as_number(value) for value in entry.value] if entry and isinstance(entry.value, list) else []
        return [] if any(map(math.isnan, values)) else values

    def says(self, names: re.Pattern) -> bool:
        """Whether a key of such a name is there and not off."""
        named = [entry for entry in self.entries if names.search(entry.name.lower())]
        return any(str(entry.value).lower() not in OFF for entry in named)

    def n_parameters(self) -> float | None:
        """About how many parameters a transformer of these sizes has; None unless width and depth are given.

        Norms, biases and routers are left out. A feed-forward layer counts as SwiGLU; where its width is missing, as
        8 d_model². With experts every layer has them, unless a list `moe_layers` says which.
        """
        width, depth, heads = map(self.number, ("d_model", "n_layers", "n_heads"))
        if not width or not depth:
            return None
        kv_share = (self.number("n_kv_heads") or heads) / heads if heads else 1
        inner = heads * (self.number("head_dim") or width / heads) if heads else width
        attention = 2 * width * inner * (1 + kv_share)
        feed_forward = 3 * width * (self.number("d_ff") or 8 / 3 * width)
        expert = 3 * width * (self.number("d_ff_expert") or 0) or feed_forward
        n_experts, listed = self.number("n_experts") or 0, self.find("moe_layers")
        n_moe = len(listed.value) if listed and isinstance(listed.value, list) else depth
        n_moe = n_moe if n_experts else 0
        layers = depth * attention + (depth - n_moe) * feed_forward + n_moe * n_experts * expert
        tied = self.find("tie_word_embeddings")
        n_tables = 1 if tied and str(tied.value).lower() == "true" else 2
        return layers + n_tables * (self.number("vocab_size") or 0) * width

    def optimizer(self) -> str | None:
        """The family of the config's optimizer: muon where Muon is one of several; None if the config does not say."""
        for entry in self.entries:
            *parents, key = entry.path
            inside = parents and parents[-1] in ("optimizer", "optim") and key in ("type", "name", "_target_", "class")
            if inside or key in ("optimizer", "optim", "optimizer_type", "optimizer_name"):
                return family(str(entry.value))
        return "adam" if any(key in self.by_key for key in ("betas", "beta1", "beta2", "adam_beta1")) else None

    def peak_rates(self) -> Iterator[tuple[Entry, float, str | None]]:
        """Each peak LR: its entry, its value > 0, and the family that it is for (by the key's own name, then the config's)."""
        for entry in self.entries:
            lr = as_number(entry.value)
            if PEAK_LR.fullmatch(entry.path[-1].lower()) and lr > 0:
                own = next(filter(None, map(family, reversed(entry.path))), None)
                yield entry, lr, own or self.optimizer()

    def groups(self) -> Iterator[tuple[Group, Entry]]:
        """The learning rates to judge, of Muon and Adam, each with the entry that sets it."""
        width, declared = int(self.number("d_model") or 1), self.find("adjust_lr")
        convention = declared.value if declared and declared.value in CONVENTIONS else CONVENTIONS[0]  # torch's default
        for entry, lr, kind in self.peak_rates():
            key = entry.path[-1]
            if kind not in ("muon", "adam") or UNLIKE_MATRICES.search(key):
                continue
            yield Group(key, kind, lr, (width, width), convention), entry
            for beside in self.entries if kind == "muon" else ():
                share = as_number(beside.value)
                if RATIO.fullmatch(beside.path[-1]) and share > 0:
                    yield Group(f"{key} · {beside.path[-1]}", "adam", share * lr), beside

    def tokens_per_update(self) -> float | None:
        """Of one process."""
        batch, length = self.number("batch_size"), self.number("max_seq_len")
        return batch * length * (self.number("gradient_accumulation_steps") or 1) if batch and length else None
