"""Checkpoints: written whole or not at all, readable without executing what they hold."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.config import ConfigError, to_dict
from moe_lab.health.sampling import WHOLE
from moe_lab.optim.groups import groups_of, pass_options
from moe_lab.train.device import is_out_of_memory
from moe_lab.train.record import replacing

if TYPE_CHECKING:
    from moe_lab.train.loop import Trainer

FOLDER = "checkpoints"
INTERRUPTED = "checkpoint_interrupted.pt"
PER_TENSOR = 1 << 10  # bytes, at most, for names and alignment of what is kept of a tensor


class RunError(RuntimeError):
    """A run cannot start or go on. One line: what, where, what to do."""

    _render_traceback_ = ConfigError._render_traceback_


class DamagedError(RunError):
    """A file that was read to its end and is no whole checkpoint."""


def checkpoint_bytes(model: nn.Module, optimizers: list[Optimizer]) -> int:
    """An upper bound of a checkpoint's size: the model, and what its optimizers keep or are going to keep: two moments in
    the parameters' format, or, where one rounds (`optim.rounding`), two moments and a master copy in float32."""
    tensors = [*model.parameters(), *model.buffers()]
    total = (1 << 20) + sum(t.nbytes + 12 * min(t.numel(), WHOLE) + PER_TENSOR for t in tensors)
    for optimizer in optimizers:
        held = sum(t.nbytes for kept in optimizer.state.values() for t in kept.values() if isinstance(t, Tensor))
        expected = sum(
            p.numel() * (3 * 4 if "rounding" in group else 2 * p.element_size())
            for group in optimizer.param_groups
            for p in group["params"]
        )
        total += max(held, expected)
    return total


def check_disk(trainer: Trainer, n_checkpoints: int = 1) -> None:
    """Raise RunError unless the disk has room for as many checkpoints."""
    needed = n_checkpoints * checkpoint_bytes(trainer.model, trainer.optimizers)
    free = shutil.disk_usage(trainer.run_dir).free
    if free < needed:
        what = f"a checkpoint needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
        todo = "free some space, or lower training.keep_checkpoints or the model's size"
        raise RunError(f"{trainer.run_dir}: {what}; {todo}")


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, and wait until the disk has it."""
    with replacing(path) as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}.pt"


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest step checkpoints; the interrupted one and foreign files stay."""
    for path in sorted((run_dir / FOLDER).glob("step_*.pt"), key=lambda path: (len(path.name), path.name))[:-keep]:
        path.unlink()


def load_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read tensors and plain values only, to `device`; "meta" reads the plain values alone, whatever the file's size.
    Raises DamagedError if the file is cut short or holds anything else; RunError if it cannot be read or held."""
    try:
        with path.open("rb") as file:  # Python calls a failing disk an OSError; torch alone, a damaged file
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if isinstance(error, OSError) or is_out_of_memory(error):
            line = f"{path}: cannot be read ({reason}); mend that, and try again: nothing was changed"
            raise RunError(line) from error
        raise DamagedError(f"{path}: not a whole checkpoint ({reason}); use another one") from error


def step_of(path: Path) -> int:
    """The step of a checkpoint: from its name, or, without reading its tensors, from what it says itself."""
    if named := re.fullmatch(r"step_(\d+)\.pt", path.name):
        return int(named[1])
    state = load_checkpoint(path, "meta")
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise DamagedError(f"{path}: holds no step; left alone")
    return state["step"]


def latest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    """The whole checkpoint with the highest step, and its content; prints a line for each file that is damaged. Raises
    RunError if there is none, or if a file cannot be read: to go on from an older one would lose what it holds."""
    steps = {}
    for path in sorted((run_dir / FOLDER).glob("*.pt")):
        try:
            steps[path] = step_of(path)
        except DamagedError as error:
            print(error, file=sys.stderr)
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        try:
            return path, load_checkpoint(path)
        except DamagedError as error:
            print(error, file=sys.stderr)
    raise RunError(f"{run_dir}: nothing to resume from, {FOLDER}/ holds no whole checkpoint; start in a new directory")


def snapshot(trainer: Trainer, tensors: bool = True) -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain Python values, from which `restore` brings the run back; or only what
    `restore_place` needs, without the model's and the optimizers' tensors."""
    rng = {"cpu": torch.get_rng_state(), "dropout": trainer.dropout_noise.get_state()}
    if trainer.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(trainer.device)
    held = {}
    if tensors:
        held["model_state_dict"] = trainer.model.state_dict()
        held["optimizer_state_dict"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
    schedule = {"step": trainer.step, "max_lr": trainer.config.training.max_lr, "n_steps": trainer.n_steps}
    return held | {
        "scheduler_state_dict": schedule | {"lr_scale": trainer.controls.lr_scale},
        "step": trainer.step,
        "tokens_seen": trainer.tokens(),
        "rng_state": rng,
        "data_state": trainer.batches.state_dict() | {"corpus": trainer.dataset.corpus_hash},
        "config": to_dict(trainer.config),
        "initial_sample": trainer.initial_sample,
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Everything as it was, except the options of the optimizers' groups: the config given decides those. The random
    numbers follow when the run begins. Raises RunError if the text has changed.
    """
    restore_place(trainer, state)
    trainer.model.load_state_dict(state["model_state_dict"])
    given = [dict(group) for group in groups_of(trainer.optimizers)]
    for optimizer, stored in zip(trainer.optimizers, state["optimizer_state_dict"], strict=True):
        for group, own in zip(stored["param_groups"], optimizer.param_groups, strict=True):
            if "fused" in own:  # then the counts are taken to the device, where a fused step looks for them
                group["fused"] = own["fused"]
        optimizer.load_state_dict(stored)
    pass_options(given, groups_of(trainer.optimizers))


def restore_place(trainer: Trainer, state: dict[str, Any]) -> None:
    """Where the run stands. Raises RunError if the text has changed."""
    if state["data_state"]["corpus"] != trainer.dataset.corpus_hash:
        text = f"the text of data.source={trainer.config.data.source} has changed since the checkpoint"
        raise RunError(f"{trainer.run_dir}: {text}; bring it back, or start in a new directory")
    trainer.step = state["step"]
    trainer.controls.lr_scale = state["scheduler_state_dict"]["lr_scale"]
    trainer.batches.load_state_dict(state["data_state"])
    trainer.initial_sample, trainer.rng_state = state["initial_sample"], state["rng_state"]


def restore_rng(trainer: Trainer, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if trainer.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], trainer.device)
    own = state.get("dropout", state.get(trainer.device.type))  # once, dropout drew from the process's generator
    if own is not None:
        trainer.dropout_noise.set_state(own)
