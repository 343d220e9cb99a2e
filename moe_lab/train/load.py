"""From a run directory back to a model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from moe_lab.config import from_dict
from moe_lab.model import LanguageModel, build_model
from moe_lab.train.checkpoint import RunError, latest_checkpoint
from moe_lab.train.device import pick_device


def load_run(run_dir: str | Path, device: str = "auto") -> tuple[LanguageModel, Tokenizer]:
    """The model of the run's last whole checkpoint, in evaluation mode and float32, and the run's tokenizer.

    Raises RunError if the directory holds no whole checkpoint or no tokenizer.
    """
    path, state, _ = latest_checkpoint(Path(run_dir))
    model = build_model(from_dict(state["config"], str(path)).model, device=pick_device(device))
    model.load_state_dict(state["model_state_dict"])
    tokenizer = Path(run_dir) / "tokenizer.json"
    if not tokenizer.exists():
        raise RunError(f"{tokenizer}: no such file; it belongs beside the checkpoints of a run")
    return model.eval(), Tokenizer.from_file(str(tokenizer))
