"""One block in a one-layer language model, at any width: float32 with the rounding shadowed, or bf16 with each step replayed.

Real text, real gradients, the report's cure as LRs (`designs.CURE`), constant after 20 updates of warm-up. Finished runs
are kept in `.cache/true_width` under a name made from what they were computed from.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.true_width.shadow import Displacement, Shadow
from moe_lab.config import Config, ModelConfig, to_dict
from moe_lab.data import prepare
from moe_lab.data.prepare import CACHE
from moe_lab.failures.designs import CURE, at, study_config
from moe_lab.failures.results import MARKS
from moe_lab.model import LanguageModel, build_model
from moe_lab.train import Trainer, read_record
from moe_lab.train.evaluate import evaluate
from moe_lab.train.loop import commit
from moe_lab.train.record import write_atomically

LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the shadow
VALIDATION_TOKENS = 8192
FORMAT = 1  # raise it whenever the same cell would give other numbers


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. `lrs`: those of the shadow, which only a float32 run has."""

    block: str  # dense or moe
    d_model: int  # a multiple of 24
    std: str = "0.02"  # or fan_in
    parameters: str = "float32"
    steps: int = MARKS[-1]
    lrs: tuple[float, ...] = LRS

    def config(self) -> Config:
        d = self.d_model
        model = {"n_layers": 1, "n_heads": 12, "n_kv_heads": 3, "n_pred_tokens": 1, "aux_loss_weights": (1.0,)}
        if self.block == "moe":
            model |= {"moe_layers": (0,), "n_experts": 8, "moe_top_k": 2, "d_ff_expert": 4 * d // 3}
        base = study_config(192).with_(model={"d_model": d, "d_ff": 8 * d // 3, **model})
        return at(base.with_(training={"steps": self.steps}), *CURE, parameters=self.parameters)


def start_values(config: ModelConfig, std: str, seed: int = 0) -> LanguageModel:
    """A float32 model with matrices of standard deviation `init_std` (std "0.02") or 1/sqrt(fan_in) ("fan_in")."""
    model = build_model(config, seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if std == "fan_in" and has_fan_in(name, p):
                p.mul_(p.shape[-1] ** -0.5 / config.init_std)
    return model


def has_fan_in(name: str, p: Tensor) -> bool:
    return p.ndim > 1 and not name.startswith("embedding")


def run_cell(cell: Cell, config: Config, path: Path | None = None, progress: bool = True) -> dict[str, Any]:
    """Train one cell with one seed. Its row so far is written to `path` (with .part) every 10 updates."""
    start, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    dataset = prepare(config.data, config.model, progress=False)
    config = config.with_(model={"vocab_size": dataset.vocab_size})
    shadow = displacement = None
    row = {"cell": asdict(cell), "validation": {}, "shadow": {}, "started": started, "commit": commit()}
    row |= {"corpus": dataset.corpus_hash, "torch": torch.__version__, "machine": platform.machine()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, folder, model=start_values(config.model, cell.std, config.training.seed))
        trainer.start()
        trainer.model.train()
        if cell.parameters == "float32":
            shadow = Shadow(trainer.model, trainer.optimizers, cell.lrs)
        else:
            # of Muon's matrices one with fan-in d_model and one with the hidden width
            displacement = Displacement(trainer.model, trainer.optimizers, ("q_proj", "down_proj"))
        label = f"{cell.block} {cell.d_model} std {cell.std} {cell.parameters}"
        for step in tqdm(range(1, cell.steps + 1), desc=label, unit="update", disable=not progress):
            trainer.update()
            if step % 10 and step not in MARKS and step != cell.steps:
                continue
            trainer.flush()
            row["updates"], row["wall_s"] = step, round(time.perf_counter() - start, 1)
            row["next_token"] = [r["losses"]["next_token"] for r in read_record(folder) if "loss" in r]
            if step in MARKS or step == cell.steps:
                tokens = dataset.validation[: VALIDATION_TOKENS + 1]
                loss = evaluate(trainer.model, tokens, config.model.max_seq_len, 16, trainer.autocast)
                row["validation"][str(step)] = loss["validation_loss"]
                row["shadow"] |= {str(step): shadow.read()} if shadow else {}
            row["displacement"] = displacement.read() if displacement else {}
            if path is not None:
                write_atomically(path.with_suffix(".part"), json.dumps(row))
    return row


def path_of(cell: Cell, config: Config) -> Path:
    what = json.dumps([FORMAT, asdict(cell), to_dict(config)], sort_keys=True)
    return CACHE / "true_width" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"


def compute(cells: Sequence[Cell], after: Callable[[], None] = lambda: None) -> None:
    """Run the cells that the cache does not hold, in order. Ctrl-C leaves the finished ones in the cache."""
    for cell in tqdm(cells, desc="runs", unit="run"):
        path = path_of(cell, cell.config())
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            row = run_cell(cell, cell.config(), path)
            write_atomically(path, json.dumps(row))
            path.with_suffix(".part").unlink()
        after()


def cached(cell: Cell) -> dict[str, Any] | None:
    """The row of a cell; where it is not finished, what it has so far; None if it has not begun."""
    path = path_of(cell, cell.config())
    found = next((p for p in (path, path.with_suffix(".part")) if p.exists()), None)
    return found and json.loads(found.read_text())
