"""One block in a one-layer language model, at any width: in bf16, or in float32 with the rounding shadowed.

Real text, real gradients, the report's cure as LRs (`designs.CURE`), constant after 20 updates of warm-up. The runs are
cells of `moe_lab.failures.experiments`, which keeps the finished ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from checks.designs import CURE, study_config, with_lrs
from torch import Tensor, nn

from benchmarks.true_width.shadow import Shadow
from moe_lab.config import Config
from moe_lab.failures.experiments import Cell, run_cells, validation_loss
from moe_lab.train import Trainer, read_record

MARKS = (40, 60, 80, 100, 120, 150)  # updates after which the runs at the case's width are read
LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of the shadow
VALIDATION_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class OneBlock:
    """One run. `lrs`: those of the shadow, which only a float32 run has."""

    block: str  # dense or moe
    d_model: int  # a multiple of 24
    std: str = "0.02"  # or fan_in, in float32
    parameters: str = "float32"
    steps: int = MARKS[-1]
    lrs: tuple[float, ...] = LRS

    def config(self) -> Config:
        d = self.d_model
        model = {"n_layers": 1, "n_heads": 12, "n_kv_heads": 3, "n_pred_tokens": 1, "aux_loss_weights": (1.0,)}
        if self.block == "moe":
            model |= {"moe_layers": (0,), "n_experts": 8, "moe_top_k": 2, "d_ff_expert": 4 * d // 3}
        base = study_config(192).with_(model={"d_model": d, "d_ff": 8 * d // 3, **model})
        return with_lrs(base.with_(training={"steps": self.steps}), *CURE, parameters=self.parameters)

    def cell(self) -> Cell:
        return Cell(config=self.config(), probe=rounding, options={"one_block": asdict(self)})


def rows_of(runs: Sequence[OneBlock]) -> list[dict[str, Any]]:
    """Rows of the runs, in order; those that the cache does not hold are run first. Ctrl-C leaves the finished ones there."""
    cells = [run.cell() for run in runs]
    rows = dict(run_cells(cells, workers=0))
    return [rows[cell.key] for cell in cells]


def rounding(trainer: Trainer, one_block: Mapping[str, Any]) -> dict[str, Any]:
    """The probe: training losses, validation losses at the marks, and what rounding would keep up to the first of them."""
    scale(trainer.model, one_block["std"], trainer.config.model.init_std)
    is_float32 = one_block["parameters"] == "float32"
    shadow = Shadow(trainer.model, trainer.optimizers, one_block["lrs"]) if is_float32 else None
    row: dict[str, Any] = {"run": one_block, "validation": {}, "shadow": {}}
    for mark in sorted({mark for mark in MARKS if mark < trainer.n_steps} | {trainer.n_steps}):
        for _ in trainer.steps(mark):
            pass
        row["validation"][str(mark)] = validation_loss(trainer, VALIDATION_TOKENS)
        if shadow and mark == MARKS[0]:
            row["shadow"] = shadow.read()
    row["next_token"] = [r["losses"]["next_token"] for r in read_record(trainer.run_dir) if "loss" in r]
    return row


@torch.no_grad()
def scale(model: nn.Module, std: str, init_std: float) -> None:
    """With std "fan_in", start values of deviation 1/sqrt(fan_in) in place of `init_std`."""
    for name, p in model.named_parameters():
        if std == "fan_in" and has_fan_in(name, p):
            p.mul_(p.shape[-1] ** -0.5 / init_std)


def has_fan_in(name: str, p: Tensor) -> bool:
    return p.ndim > 1 and not name.startswith("embedding")
