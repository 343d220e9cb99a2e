"""What the health checks say: findings, and the one table of rules that they come from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SEVERITIES = ("error", "warning", "info")


def several(names: Sequence[str]) -> str:
    """`a`, or `a and 3 more`."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def grouped(things: Iterable, key: Callable) -> dict[Any, list]:
    """Things by their `key(thing)`, in the order of their first."""
    groups: dict[Any, list] = {}
    for thing in things:
        groups.setdefault(key(thing), []).append(thing)
    return groups


def counts(severities: Iterable[str]) -> str:
    """`0 errors, 2 warnings, 1 info`, of the severities of findings."""
    given = list(severities)
    numbers = {name: given.count(name) for name in SEVERITIES}
    return ", ".join(f"{n} {name}" if n == 1 or name == "info" else f"{n} {name}s" for name, n in numbers.items())


@dataclass(frozen=True)
class Finding:
    """One thing that a rule found. `error`: the run is sick, stop; `warning`: likely wrong, look; `info`: good to know."""

    rule: str  # an id of RULES
    severity: str  # error, warning or info
    where: str  # a parameter, a group, a file's line, or "loss"
    message: str  # what, where, how sure: one line
    advice: str  # what to do: one line
    value: float | str | None = None  # what was measured
    limit: float | str | None = None  # what it was held against
    step: int | None = None  # optimizer updates of the run done when it was found; None: found without a run

    def __post_init__(self) -> None:
        highest, _ = RULES[self.rule]
        if SEVERITIES.index(self.severity) < SEVERITIES.index(highest):
            raise ValueError(f"severity={self.severity!r}: {self.rule} reaches {highest} at most")

    def __str__(self) -> str:
        when = "" if self.step is None else f" (step {self.step})"
        return f"{self.severity}: {self.rule}: {self.message}{when}. {self.advice}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        return asdict(self)


# rule id → (the highest severity it can reach, what it says). Every finding carries one of these ids.
RULES: dict[str, tuple[str, str]] = {
    "ranks_apart": ("error", "ranks that began as copies of one model have other weights"),
    "ranks_same_data": ("error", "all ranks train on the same batches"),
    "one_rank_nonfinite": ("error", "a gradient or a loss is NaN or infinite on some ranks and not on others"),
    "lost_updates": ("error", "the optimizer's updates are rounded away: realised displacement is below the intended"),
    "bf16_parameters": ("error", "16-bit parameters without fp32 masters, Kahan or stochastic-rounding state"),
    "frozen_tensor": ("error", "a tensor has gradients and a learning rate, yet no element of it has moved"),
    "broken_tie": ("warning", "a token table and a head that should be one tensor and are two"),
    "no_gradient": ("error", "a trainable tensor gets no gradient"),
    "not_in_optimizer": ("error", "a trainable tensor is in no optimizer"),
    "updated_twice": ("error", "a tensor is in two optimizers, or twice in one"),
    "frozen_module": ("warning", "part of the model has requires_grad=False and was not declared frozen"),
    "norm_start": ("warning", "fresh norms begin with other gains, biases or epsilons than norms do"),
    "delta_start": ("warning", "a state space model's fresh time steps are far from 0.001 to 0.1"),
    "stuck_copy": (
        "warning",
        "a copy that follows the weights, such as an average: 16 bits stop it, its statistics stay behind, or it began elsewhere; casts that autocast keeps",
    ),
    "rough_positions": ("warning", "a table of positions or frequencies in 16 bits: late positions run together"),
    "counted_twice": ("warning", "a buffer that a forward pass adds to is added to again when the pass is recomputed"),
    "collapsed_experts": ("warning", "as few experts as a token chooses take nearly all tokens"),
    "starved_experts": ("info", "experts that get less than a tenth of their share of the tokens"),
    "constant_term": ("warning", "a scalar with a gradient that never varies: as a loss term it teaches nothing"),
    "alike_units": (
        "warning",
        "units of a layer that begin as copies of each other, or get the same gradient and stay one",
    ),
    "dead_units": (
        "warning",
        "most units of a layer had no gradient for 30 updates: they are off whenever they were looked at",
    ),
    "constant_output": ("warning", "a model gives the same answer whatever it is given"),
    "heavy_decay": ("warning", "weight decay, and not the loss, decides where the weights go: they shrink to zero"),
    "heavy_dropout": ("warning", "a dropout that leaves next to nothing"),
    "input_scale": (
        "warning",
        "numbers far from the size that weights are drawn for, or validation's far from training's",
    ),
    "faint_gradient": ("warning", "matrices whose gradient is a millionth of the others', relative to their weights"),
    "nonfinite_gradient": ("error", "a gradient is NaN or infinite"),
    "no_updates": ("error", "losses are observed and no optimizer steps"),
    "stale_gradients": ("error", "gradients of earlier updates are not cleared, or used for a second step"),
    "cleared_gradients": ("error", "gradients are cleared between backward pass and step, or between micro-batches"),
    "empty_clip": (
        "warning",
        "clipping that finds no gradient: it comes before the backward pass, or is handed nothing",
    ),
    "not_measured": ("warning", "something that the watch could not measure, and why"),
    "mixed_stack": ("warning", "orthogonal steps of a stack whose matrices are not stepped one by one"),
    "turned_factor": ("warning", "a factor by shape that takes inputs for outputs"),
    "starved_steps": ("warning", "gradients or steps that arrive far too small: clipped, unscaled or below Adam's eps"),
    "lost_decay": ("warning", "weight decay that 16-bit weights round away"),
    "lr_overwritten": ("warning", "learning rates that were given are not those of the updates"),
    "lr_spent": ("warning", "learning rates near zero by half of the budget or for good, or that warm up beyond it"),
    "lr_too_low": ("error", "learning rates far below the usual, or tiny steps; an error if a branch probe proves it"),
    "lr_too_high": ("error", "learning rates far above a language model's usual, or the loss blows up"),
    "muon_convention": ("warning", "a Muon learning rate that fits the other convention, or AdamW"),
    "initial_loss": ("warning", "the first loss is not what an untrained model of this vocabulary shows"),
    "nonfinite_loss": ("error", "the loss is NaN or infinite"),
    "loss_not_falling": ("warning", "the loss has not fallen although the learning rates had time to act"),
    "reach": ("info", "how far a weight can travel at most within the planned updates"),
    "direction_bias": ("warning", "16-bit weights only move one way: the other direction is rounded away"),
    "weight_decay_on_norms": ("info", "weight decay pulls norm weights or biases towards 0"),
    "unread_key": ("warning", "a config key that nothing reads"),
    "schedule": ("warning", "warm-up, decay, intervals and budget that do not fit, or count different steps"),
    "lr_baked_in": ("warning", "a checkpoint carries a learning rate that a plain resume would bring back"),
    "never_moved": ("error", "a tensor of a checkpoint still holds its start values"),
    "unreadable": ("error", "a file that cannot be read safely"),
    "nonfinite_values": ("error", "a checkpoint, a batch, or what an optimizer keeps holds NaN or infinite values"),
    "step_counters": ("warning", "a checkpoint's steps, tokens and optimizer updates do not fit together"),
    "constant_tokens": ("error", "one token is nearly all of the text"),
    "constant_targets": ("warning", "all targets are one number"),
    "sorted_data": ("warning", "classes come one after the other, unshuffled"),
    "random_tokens": ("warning", "the tokens look random: a text repeats itself and compresses"),
    "repeated_data": ("warning", "rows that stood in an earlier place already"),
    "one_text": ("warning", "neighbouring rows are of one text: an update sees one document alone"),
    "comment_contradicts": ("warning", "a switch whose comment says the opposite of its value"),
    "label_shift": ("error", "labels are not the next token but another one, or what stands in the input"),
    "shared_target": ("warning", "all outputs of a pass are held against one and the same target"),
    "out_of_range": ("warning", "a loss is given no log-probabilities, or targets that no output can meet"),
    "squashed_twice": ("warning", "a softmax or sigmoid before a loss that makes another one"),
    "never_a_target": ("warning", "a token that follows others and is never asked for"),
    "padding_in_loss": ("warning", "the padding at a row's end is a target"),
    "prompt_in_loss": ("warning", "prompts are targets: in place of the answers, or a beginning that all rows share"),
    "token_weights": ("warning", "tokens of one update weigh very differently: means of micro-batches count alike"),
    "uneven_targets": ("info", "batches with very different numbers of targets, whose mean losses weigh the same"),
    "split_overlap": ("warning", "validation text that stands in training, too"),
    "no_effect": (
        "warning",
        "what the loss does not depend on: a part of the batch, or what a softmax or norm over one number is given",
    ),
    "future_leak": ("error", "a token changes the logits before it, or those of another sequence"),
    "mode_mismatch": ("warning", "training and evaluation compute otherwise: modules of one alone, statistics far off"),
    "evaluation_mode": ("error", "updates in evaluation mode: dropout is off, batch norms keep old statistics"),
    "scaled_copies": (
        "error",
        "tokens that a sublayer leaves alone come out multiplied, or blocks return their input twice",
    ),
    "not_linear": ("warning", "a tensor that is no matrix of any product gets orthogonal steps"),
    "short_memory": ("warning", "a module that promises memory, whose output depends on the nearest tokens alone"),
    "rank_positions": ("warning", "tokens that were chosen get their ranks as positions, not their places"),
    "unexpected_tensors": ("warning", "a checkpoint whose tensors are not those of a known run"),
}

# Sickness → the rule that names it: the first finding of at least `warning` in a sick run must carry this id.
# benchmarks/detection.py holds runs of each.
SICKNESSES: dict[str, str] = {
    "bf16 parameters": "lost_updates",
    "LR too low": "lr_too_low",
    "LR too high": "lr_too_high",
    "conventions mixed up": "muon_convention",
    "group missing": "not_in_optimizer",
    "branch detached": "no_gradient",
    "frozen by accident": "frozen_module",
}
