"""A run's directory: who may write there, what a run begins and ends with, and what a resumed one finds and takes."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
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
from moe_lab.train.record import FINDINGS, RECORD, commit, cut_jsonl, read_jsonl, read_record, write_atomically

if TYPE_CHECKING:
    from moe_lab.train.loop import Trainer

# The given config decides these: the LR and the budget, and how the run is watched. Every other stored value is kept,
# since the stored state (data order, momenta, random numbers) only makes sense with it.
GIVEN_WINS = {
    *("steps", "total_tokens", "max_lr", "min_lr_ratio", "warmup_steps", "adamw_lr_ratio", "embedding_lr_ratio"),
    *("log_interval", "eval_interval", "save_interval", "keep_checkpoints", "device", "activation_checkpointing"),
}
NOT_ARCHITECTURE = {
    *("dropout", "init_std", "moe_balance_weight", "moe_z_weight", "mod_predictor_weight", "aux_loss_weights"),
}


def last_written(run_dir: Path) -> int | None:
    """When the directory's record was last changed, in ns since the epoch; None if there is none."""
    return (run_dir / RECORD).stat().st_mtime_ns if (run_dir / RECORD).exists() else None


def refuse_used(trainer: Trainer) -> None:
    """Raise RunError if the directory holds a run: not to be resumed, or gone on since this trainer read it."""
    if last_written(trainer.run_dir) != trainer.record_time:
        ways = "continue it with resume=True (--resume on the shell), or take another directory"
        raise RunError(f"{trainer.run_dir}: holds a run already; {ways}")


def to_resume(path: Path, state: dict[str, Any], given: Config) -> tuple[dict[str, Any], Config]:
    """The state of a checkpoint and the config to go on with; prints each difference, and which value is used. What the
    run had found for `compute: auto`, and a vocabulary that the text could not fill, stand without a line. Raises
    RunError for another architecture."""
    merged, lines = to_dict(from_dict(state["config"], str(path))), []
    for name, values in to_dict(given).items():
        for key, new in values.items():
            old = merged[name][key]
            if old == new or (key == "compute" and new == "auto") or (key == "vocab_size" and new > old):
                continue
            if name == "model" and key not in NOT_ARCHITECTURE:
                differs = f"{path}: model.{key} is {old} there and {new} in the config given"
                raise RunError(f"{differs}; another architecture cannot resume: start in a new directory")
            result = "given value is used" if key in GIVEN_WINS else "stored value is kept"
            merged[name][key] = new if key in GIVEN_WINS else old
            lines.append(f"{name}.{key}: stored {old}, given {new}: the {result}")
    print(f"resuming after step {state['step']} of {path}", *lines, sep="\n", file=sys.stderr)
    return state, from_dict(merged, str(path))


@contextlib.contextmanager
def opened(trainer: Trainer) -> Iterator[None]:
    """The run's directory, held against other processes and with everything that a run begins with: for who writes
    there beside `fit`, such as a Watch with a log. Raises RunError if another process trains there, or did meanwhile.
    """
    run_dir = trainer.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        trainer.lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{run_dir}: another process trains here; wait for it or take another directory") from None
    except OSError as error:
        raise RunError(f"{run_dir}: cannot be a run directory: {error.strerror}; take another one") from None
    try:
        begin(trainer)
        yield
    finally:
        trainer.lock.release()


def begin(trainer: Trainer) -> None:
    """Write what a run begins with, or cut off what a resumed one will write again. Nothing if the run has begun."""
    if trainer.begun:
        return
    run_dir, training = trainer.run_dir, trainer.config.training
    refuse_used(trainer)  # again: another process may have come and gone
    if trainer.step > trainer.n_steps:
        raise RunError(f"{run_dir}: {trainer.step} steps are done and training.steps={trainer.n_steps}; ask for more")
    folder = run_dir / ckpt.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("*.part"):  # a save that a kill cut short; of many ranks, a folder
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
    ckpt.check_disk(trainer, training.keep_checkpoints + 1)
    trainer.initial_sample = trainer.initial_sample or start_sample(trainer.model)
    torch.manual_seed(training.seed)  # for whatever draws beside dropout, such as stochastic rounding
    trainer.dropout_noise = torch.Generator(trainer.device).manual_seed(training.seed)
    if trainer.rng_state is not None:
        ckpt.restore_rng(trainer, trainer.rng_state)
    rows, controls, _ = (cut_jsonl(run_dir / name, trainer.step) for name in (RECORD, CONTROLS, FINDINGS))
    trainer.evaluated = max((row["step"] for row in rows if row.get("event") == "eval"), default=-1)
    for row in controls:  # what was asked right after the checkpoint was written
        trainer.controls.lr_scale = row.get("value", trainer.controls.lr_scale)
    write_atomically(run_dir / "config.yaml", to_yaml(trainer.config))
    write_atomically(run_dir / "tokenizer.json", trainer.dataset.tokenizer.to_str())
    (run_dir / RECORD).touch()
    trainer.fetched_at = max((row["seconds"] for row in rows), default=0.0)
    trainer.started = time.perf_counter() - trainer.fetched_at
    trainer.begun = True


def write_summary(trainer: Trainer, status: str) -> dict[str, Any]:
    """Write summary.json from what the record holds; returns its content. `findings`: null if nothing watched."""
    rows = read_record(trainer.run_dir)
    losses = [row["loss"] for row in rows if "loss" in row][-trainer.config.training.log_interval :]
    validation = next((row["validation_loss"] for row in reversed(rows) if "validation_loss" in row), None)
    dataset = trainer.dataset
    wall = trainer.seconds()
    findings = trainer.run_dir / FINDINGS
    n_targets = len(dataset.validation) - 1
    summary = {
        "status": status,
        "train_loss": sum(losses) / len(losses) if losses else None,
        "validation_loss": validation,
        "trigram_loss": trainer.floors["trigram"],
        "bits_per_byte": validation and validation * n_targets / dataset.validation_bytes / math.log(2),
        "steps": trainer.step,
        "tokens": trainer.tokens(),
        "wall_s": round(wall, 1),
        "tokens_per_s": round(trainer.tokens() / wall, 1) if wall else 0.0,
        "seed": trainer.config.training.seed,
        "commit": commit(),
        "corpus": dataset.corpus_hash,
        "findings": read_jsonl(findings) if findings.exists() else None,
    }
    write_atomically(trainer.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def load_run(run_dir: str | Path, device: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """The model of the run's last whole checkpoint, in evaluation mode and float32, and the run's tokenizer. Raises
    RunError if the directory holds no whole checkpoint or no tokenizer."""
    path, state = ckpt.latest_checkpoint(Path(run_dir))
    model = build_model(from_dict(state["config"], str(path)).model, device=pick_device(device))
    model.load_state_dict(state["model_state_dict"])
    tokenizer = Path(run_dir) / "tokenizer.json"
    if not tokenizer.exists():
        raise RunError(f"{tokenizer}: no such file; it belongs beside the checkpoints of a run")
    return model.eval(), Tokenizer.from_file(str(tokenizer))
