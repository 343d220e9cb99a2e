"""What a resumed run takes from its checkpoint and what from the config it is given."""

from __future__ import annotations

from moe_lab.config import Config, from_dict, to_dict
from moe_lab.train.checkpoint import RunError

# The given config decides these: the LR and the budget, and how the run is watched. Every other stored value is kept,
# since the stored state (data order, momenta, random numbers) only makes sense with it.
GIVEN_WINS = {
    "training": {
        *("steps", "total_tokens", "max_lr", "min_lr_ratio", "warmup_steps"),
        *("log_interval", "eval_interval", "save_interval", "keep_checkpoints", "device", "activation_checkpointing"),
    },
    "optimizer": {"adamw_lr_ratio", "embedding_lr_ratio"},
}
NOT_ARCHITECTURE = {
    *("dropout", "init_std", "mamba_kernel", "moe_capacity_factor"),
    *("moe_balance_weight", "moe_z_weight", "mod_predictor_weight", "aux_loss_weights"),
}


def merge(stored_values: dict, given: Config, origin: str) -> tuple[Config, list[str]]:
    """The config to go on with, and one line for every difference between stored and given, saying which one is used.

    `given` still may say `auto` for precision.compute and a vocabulary that the text could not fill: then what the run
    had found stands, without a line. Raises RunError, naming `origin`, for another architecture.
    """
    stored = from_dict(stored_values, origin)
    merged, lines = to_dict(stored), []
    for name, values in to_dict(given).items():
        for key, new in values.items():
            old = merged[name][key]
            if old == new or (key == "compute" and new == "auto") or (key == "vocab_size" and new > old):
                continue
            if name == "model" and key not in NOT_ARCHITECTURE:
                raise RunError(
                    f"{origin}: model.{key} is {old} there and {new} in the config given; "
                    "another architecture cannot resume: start in a new directory"
                )
            if key in GIVEN_WINS.get(name, ()):
                merged[name][key] = new
                lines.append(f"{name}.{key}: stored {old}, given {new}: the given value is used")
            else:
                lines.append(f"{name}.{key}: stored {old}, given {new}: the stored value is kept")
    return from_dict(merged, origin), lines
