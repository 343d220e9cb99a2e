"""Checkpoints: written whole or not at all, readable without executing what they hold."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

FOLDER = "checkpoints"
INTERRUPTED = "checkpoint_interrupted.pt"
SAMPLE_SIZE = 256  # initial values kept of each tensor; smaller tensors are kept whole


class RunError(RuntimeError):
    """A run cannot start or go on. One line: what, where, what to do."""


def initial_sample(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Of each parameter, evenly spaced flat indices (int64) and the values there now, on the CPU.

    A checkpoint carries the sample of step 0, so that what never moved can be told from the file alone.
    """
    sample = {}
    for name, p in model.named_parameters():
        index = torch.arange(min(p.numel(), SAMPLE_SIZE)) * max(1, p.numel() // SAMPLE_SIZE)
        sample[name] = {"index": index, "value": p.detach().flatten()[index.to(p.device)].cpu()}
    return sample


def checkpoint_bytes(model: nn.Module, optimizers: list[Optimizer]) -> int:
    """An upper estimate of a checkpoint's size: parameters, and two moments of each that an optimizer holds."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    updated = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    return parameters + buffers + sum(2 * p.numel() * p.element_size() for p in updated) + (1 << 20)


def check_disk(folder: Path, n_bytes: int) -> None:
    """Raise RunError unless the folder's disk has `n_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise RunError(
            f"{folder}: a checkpoint needs {n_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; "
            "free some space, or lower training.keep_checkpoints or the model's size"
        )


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write beside the place and rename: a crash at any moment leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must reach the disk
    finally:
        os.close(folder)


def step_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:06d}.pt"


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the `keep` newest step checkpoints; the interrupted one and foreign files stay."""
    for path in sorted((run_dir / FOLDER).glob("step_*.pt"), key=lambda path: (len(path.name), path.name))[:-keep]:
        path.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read tensors and plain values only. Raises RunError if the file is missing, cut short or holds anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise RunError(f"{path}: not a whole checkpoint ({type(error).__name__}: {reason}); use another one") from error


def latest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The whole checkpoint with the highest step, its content, and a line for each file that is not whole.

    Raises RunError if there is none.
    """
    best, broken = None, []
    for path in sorted((run_dir / FOLDER).glob("*.pt")):
        try:
            state = load_checkpoint(path)
            if best is None or state["step"] > best[1]["step"]:
                best = path, state
        except (RunError, KeyError, TypeError) as error:
            broken.append(str(error) if isinstance(error, RunError) else f"{path}: holds no step; left alone")
    if best is None:
        raise RunError(
            f"{run_dir}: nothing to resume from, {FOLDER}/ holds no whole checkpoint; start in a new directory"
        )
    return *best, broken


def rng_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
