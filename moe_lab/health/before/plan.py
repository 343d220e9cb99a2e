"""What a config plans, read off its keys, by whichever name a project calls them: sizes, optimizers, LRs, the schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
    "steps": ("max_steps", "total_steps", "n_steps", "max_iters", "train_steps", "num_iterations"),
    "total_tokens": ("max_tokens",),
    "batch_size": ("micro_batch_size", "per_device_train_batch_size"),
    "gradient_accumulation_steps": ("grad_accum_steps", "n_accum", "accumulation_steps"),
    "warmup_steps": ("warmup_iters", "warmup", "n_warmup"),
    "adjust_lr": ("adjust_lr_fn",),
    "betas": ("adam_betas", "adamw_betas"),
}
FAMILIES = ("muon", "adam", "sgd", "lion", "adafactor", "sophia", "shampoo", "soap", "lamb", "rmsprop", "adagrad")
PEAK_LR = re.compile(r"(?!(?:\w+_)?(?:min|final|end|init|warmup|adjust|decay)_)(?:\w+_)?(?:lr|learning_rate)")
RATIO = re.compile(r"(?:adamw?|embed\w*)_lr_(?:ratio|scale|multiplier)")  # an LR of Adam's, as a share of Muon's
UNLIKE_MATRICES = re.compile(r"embed|head|scalar|bias|vector")  # their own LR, a hundred times another's, can be right
NOT_FROM_SCRATCH = re.compile(r"pretrained|finetune|fine_tune|from_checkpoint|init_from|load_from|lora|peft|adapter")
OFF = (None, False, "", 0, "none", "scratch")


class Comment(NamedTuple):
    line: int  # from 1
    text: str  # without the #


class Entry(NamedTuple):
    """One key of a config with a plain value, and the comments beside it and right above it."""

    path: tuple[str, ...]  # ("training", "max_lr")
    value: Any  # a scalar or a list of scalars
    line: int | None = None  # from 1; None where the config is no file
    text: str = ""  # the line
    comments: tuple[Comment, ...] = ()

    @property
    def name(self) -> str:
        return ".".join(self.path)


def as_number(value: Any) -> float | None:
    """A finite number, also one that YAML takes for text (3e-4); None for everything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def family(name: str) -> str | None:
    """`adam` for adamw_torch_fused, `muon` for Muon; the first of FAMILIES that the name holds, or None."""
    return next((known for known in FAMILIES if known in name.lower()), None)


class Plan:
    """A config's entries and the questions that the rules ask. Answers are None where the keys do not tell."""

    def __init__(self, entries: Sequence[Entry], origin: str | None = None, aliases: Mapping = ALIASES):
        self.entries, self.origin, self.aliases = list(entries), origin, aliases
        self.by_key: dict[str, Entry] = {}
        for entry in self.entries:
            self.by_key.setdefault(entry.path[-1], entry)

    def where(self, entry: Entry) -> str:
        """`file:line`, or the key's name where there is no file."""
        return f"{self.origin}:{entry.line}" if entry.line else entry.name

    def find(self, key: str) -> Entry | None:
        """The first entry of that key, at any depth, or of one of its aliases."""
        return next((self.by_key[name] for name in (key, *self.aliases.get(key, ())) if name in self.by_key), None)

    def number(self, key: str, default: float | None = None) -> float | None:
        """A number of at least 0, else the default."""
        entry = self.find(key)
        number = as_number(entry.value) if entry else None
        return default if number is None or number < 0 else number

    def from_scratch(self) -> bool:
        """Whether no key names weights to start from."""
        return not any(NOT_FROM_SCRATCH.search(e.name.lower()) and e.value not in OFF for e in self.entries)

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def n_parameters(self) -> float | None:
        """About how many parameters a transformer of these sizes has; None unless width and depth are given.

        Norms, biases and routers are left out. A feed-forward layer counts as SwiGLU; where its width is missing, as
        8 d_model². With experts every layer has them, unless a list `moe_layers` says which.
        """
        width, depth, heads = self.number("d_model"), self.number("n_layers"), self.number("n_heads")
        if not width or not depth:
            return None
        kv_share = self.number("n_kv_heads", heads) / heads if heads else 1.0
        inner = (self.number("head_dim") or width / heads) * heads if heads else width
        attention = 2 * width * inner * (1 + kv_share)
        feed_forward = 3 * width * (self.number("d_ff") or 8 / 3 * width)
        n_experts, moe_layers = self.number("n_experts", 0.0), self.find("moe_layers")
        listed = moe_layers and isinstance(moe_layers.value, list)
        n_moe = (len(moe_layers.value) if listed else depth) if n_experts else 0
        experts = n_experts * (3 * width * self.number("d_ff_expert", 0.0) or feed_forward)
        tied = self.find("tie_word_embeddings")
        tables = 1 if tied and tied.value is True else 2
        layers = depth * attention + (depth - n_moe) * feed_forward + n_moe * experts
        return layers + tables * self.number("vocab_size", 0.0) * width

    # ---- optimizers --------------------------------------------------------------------------------------------------

    def optimizer(self) -> str | None:
        """The family of the config's optimizer: muon where Muon is one of several; None if the config does not say."""
        for entry in self.entries:
            *parents, key = entry.path
            inside = parents and parents[-1] in ("optimizer", "optim") and key in ("type", "name", "_target_", "class")
            if inside or key in ("optimizer", "optim", "optimizer_type", "optimizer_name"):
                return family(str(entry.value))
        return "adam" if any(key in self.by_key for key in ("betas", "beta1", "beta2", "adam_beta1")) else None

    def peak_rates(self) -> list[tuple[Entry, float, str | None]]:
        """Each peak LR: its entry, its value > 0, and the family that it is for (by the key's own name, then the config's)."""
        rates = []
        for entry in self.entries:
            number = as_number(entry.value)
            if PEAK_LR.fullmatch(entry.path[-1].lower()) and (number or 0) > 0:
                own = next(filter(None, map(family, reversed(entry.path))), None)
                rates.append((entry, number, own or self.optimizer()))
        return rates

    def convention(self) -> str:
        """Muon's convention; where the config does not say, torch.optim.Muon's default."""
        entry = self.find("adjust_lr")
        return entry.value if entry and entry.value in CONVENTIONS else CONVENTIONS[0]

    def groups(self) -> list[tuple[Group, Entry]]:
        """The learning rates to judge, each with the entry that sets it."""
        width = int(self.number("d_model") or 1)
        groups = []
        for entry, lr, name in self.peak_rates():
            judged = name in ("muon", "adam") and not UNLIKE_MATRICES.search(entry.path[-1].lower())
            kind = name if judged else "other"
            groups.append((Group(entry.path[-1], kind, lr, (width, width), self.convention()), entry))
            for beside in self.entries if kind == "muon" else ():
                ratio = as_number(beside.value) or 0.0
                if RATIO.fullmatch(beside.path[-1]) and ratio > 0:
                    groups.append((Group(f"{entry.path[-1]} · {beside.path[-1]}", "adam", ratio * lr), beside))
        return groups

    # ---- the schedule ------------------------------------------------------------------------------------------------

    def n_updates(self) -> int | None:
        """Optimizer updates of the run."""
        steps = self.number("steps")
        if steps:
            return int(steps)
        tokens, at_once = self.number("total_tokens"), self.tokens_per_update()
        return math.ceil(tokens / at_once) if tokens and at_once else None

    def tokens_per_update(self) -> float | None:
        """Of one process."""
        batch, length = self.number("batch_size"), self.number("max_seq_len")
        return batch * length * self.number("gradient_accumulation_steps", 1.0) if batch and length else None


def sum_of_shares(until: int, n_updates: int, warmup: int, min_ratio: float) -> float:
    """Σ LR / peak over updates 1 … until: linear warm-up (update n runs at n / warmup), then a cosine to min_ratio.

    In closed form, since a planned run may have millions of updates. `until` is at most n_updates.
    """
    warm = min(until, warmup)
    total = warm * (warm + 1) / 2 / max(1, warmup)
    n_cosine, done = n_updates - warmup, until - warm
    if done <= 0:
        return total
    angle = math.pi / n_cosine
    cosines = (math.sin((done + 0.5) * angle) / math.sin(angle / 2) - 1) / 2  # Σ cos(k · angle), k = 1 … done
    return total + done * min_ratio + (1 - min_ratio) * (done + cosines) / 2
