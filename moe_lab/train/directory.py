"""A run's directory: who may write there, what a run begins with, and what a resumed one finds and takes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import Timeout
from tokenizers import Tokenizer

from moe_lab.config import Config, from_dict, to_dict, to_yaml
from moe_lab.health.sampling import start_sample
from moe_lab.model import LanguageModel, build_model
from moe_lab.train import checkpoint as ckpt
from moe_lab.train.checkpoint import RunError
from moe_lab.train.controls import CONTROLS
from moe_lab.train.device import pick_device
from moe_lab.train.record import FINDINGS, RECORD, cut_jsonl, read_jsonl, read_record, write_atomically

if TYPE_CHECKING:
    from moe_lab.train.loop import Trainer

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


def refuse_used(trainer: Trainer) -> None:
    """Raise RunError if the directory holds a run that is not to be resumed."""
    if not trainer.resume and (trainer.run_dir / RECORD).exists():
        raise RunError(
            f"{trainer.run_dir}: holds a run already; continue it with resume=True, or take another directory"
        )


def to_resume(run_dir: Path, config: Config) -> tuple[dict[str, Any], Config, list[str]]:
    """The state to go on from, the config to go on with, and lines for the person who resumes."""
    path, state, damaged = ckpt.latest_checkpoint(run_dir)
    config, differences = merge(state["config"], config, str(path))
    return state, config, [*damaged, f"resuming after step {state['step']} of {path}", *differences]


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


@contextlib.contextmanager
def held(trainer: Trainer) -> Iterator[None]:
    """Hold the directory, which is made if need be, against other processes."""
    run_dir = trainer.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        trainer.lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{run_dir}: another process trains here; wait for it or take another directory") from None
    except OSError as error:
        raise RunError(f"{run_dir}: cannot be a run directory: {error.strerror}; take another one") from None
    try:
        yield
    finally:
        trainer.lock.release()


def begin(trainer: Trainer) -> None:
    """Write what a run begins with, or cut what a resumed one will write again. Nothing if the run has begun."""
    if trainer.begun:
        return
    run_dir, training = trainer.run_dir, trainer.config.training
    refuse_used(trainer)  # again: another process may have come and gone
    if ckpt.stamps(run_dir) - trainer.stamps:
        raise RunError(f"{run_dir}: another process has gone on with this run meanwhile; start again")
    (run_dir / ckpt.FOLDER).mkdir(parents=True, exist_ok=True)
    for unfinished in (run_dir / ckpt.FOLDER).glob("*.part"):
        unfinished.unlink()  # a save that a kill cut short
    size = ckpt.checkpoint_bytes(trainer.model, trainer.optimizers)
    ckpt.check_disk(run_dir, size * (training.keep_checkpoints + 1))
    if trainer.step > trainer.n_steps:
        raise RunError(f"{run_dir}: {trainer.step} steps are done and training.steps={trainer.n_steps}; ask for more")
    trainer.initial_sample = trainer.initial_sample or start_sample(trainer.model)
    torch.manual_seed(training.seed)  # for whatever draws beside dropout, such as stochastic rounding
    trainer.dropout_noise = torch.Generator(trainer.device).manual_seed(training.seed)
    if trainer.rng_state is not None:
        ckpt.restore_rng(trainer.rng_state, trainer.device, trainer.dropout_noise)
    cut_back(trainer)
    for notice in trainer.notices:
        print(notice, file=sys.stderr)
    write_atomically(run_dir / "config.yaml", to_yaml(trainer.config))
    write_atomically(run_dir / "tokenizer.json", trainer.dataset.tokenizer.to_str())
    (run_dir / RECORD).touch()
    trainer.started = trainer.fetched = time.perf_counter()
    trainer.begun = True


def cut_back(trainer: Trainer) -> None:
    """Drop from record, controls and findings what came after the checkpoint: it will come again."""
    for name in (RECORD, CONTROLS, FINDINGS):
        cut_jsonl(trainer.run_dir / name, trainer.step)
    rows = read_record(trainer.run_dir)
    trainer.evaluated = {row["step"] for row in rows if row.get("event") == "eval"}
    trainer.seconds_before = max((row["seconds"] for row in rows), default=0.0)
    for row in read_jsonl(trainer.run_dir / CONTROLS):  # what was asked right after the checkpoint was written
        if row["action"] == "lr_scale":
            trainer.controls.lr_scale = row["value"]


def load_run(run_dir: str | Path, device: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """The model of the run's last whole checkpoint, in evaluation mode and float32, and the run's tokenizer.

    Raises RunError if the directory holds no whole checkpoint or no tokenizer.
    """
    path, state, _ = ckpt.latest_checkpoint(Path(run_dir))
    model = build_model(from_dict(state["config"], str(path)).model, device=pick_device(device))
    model.load_state_dict(state["model_state_dict"])
    tokenizer = Path(run_dir) / "tokenizer.json"
    if not tokenizer.exists():
        raise RunError(f"{tokenizer}: no such file; it belongs beside the checkpoints of a run")
    return model.eval(), Tokenizer.from_file(str(tokenizer))
