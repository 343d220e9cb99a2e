"""The rules of a watch, in the order in which they are asked.

Limits stand on top of the file whose rule has them, those that several rules share in state.py, and nowhere else. They were
chosen on one half of the runs of `make detection` and judged on the other (benchmarks/detection.json).
"""

from __future__ import annotations

from .rule import Rule, already_told
from .rules_loss import INITIAL_LOSS, LOSS_NOT_FALLING, LOSS_ROSE, NONFINITE_LOSS, WEIGHT_DECAY_ON_NORMS
from .rules_lr import learning_rates, reach
from .rules_setup import (
    CUT_OFF,
    FROZEN_BASE,
    FROZEN_MODULE,
    IDLE,
    NONFINITE_GRADIENT,
    NOT_FROZEN,
    NOT_IN_OPTIMIZER,
    SPARSE_GRADIENT,
    UPDATED_TWICE,
)
from .rules_updates import BF16_PARAMETERS, DIRECTION_BIAS, FROZEN_TENSOR, LOST, PARTLY_LOST

# In order of certainty: a broken set-up explains what comes after it.
ALL = (
    *(NOT_IN_OPTIMIZER, UPDATED_TWICE, FROZEN_MODULE, FROZEN_BASE, NOT_FROZEN, NONFINITE_GRADIENT),
    *(LOST, PARTLY_LOST, CUT_OFF, IDLE, FROZEN_TENSOR, BF16_PARAMETERS),
    *(
        Rule(id, "warning", *already_told(learning_rates, id))
        for id in ("muon_convention", "lr_too_low", "lr_too_high")
    ),
    *(NONFINITE_LOSS, LOSS_ROSE, LOSS_NOT_FALLING, INITIAL_LOSS, DIRECTION_BIAS),
    Rule("reach", "info", *already_told(reach, "reach"), once=True),
    *(WEIGHT_DECAY_ON_NORMS, SPARSE_GRADIENT),
)
