"""The rules of a watch, in the order in which they are asked. Each looks at a State and yields findings.

Their thresholds stand on top of the four files, and nowhere else. They were chosen on one half of the runs of `make
detection` and judged on the other (benchmarks/detection.json).
"""

from __future__ import annotations

from .rules_loss import initial_loss, loss_trend, weight_decay_on_norms
from .rules_lr import learning_rates, reach
from .rules_setup import (
    frozen_module,
    no_gradient,
    nonfinite_gradient,
    not_frozen,
    not_in_optimizer,
    sparse_gradient,
    updated_twice,
)
from .rules_updates import bf16_parameters, direction_bias, frozen_tensor, lost_updates

# In order of certainty: a broken set-up explains what comes after it.
CHECKS = (
    *(not_in_optimizer, updated_twice, frozen_module, not_frozen, nonfinite_gradient),
    *(lost_updates, no_gradient, frozen_tensor, bf16_parameters, learning_rates),
    *(loss_trend, initial_loss, direction_bias, reach, weight_decay_on_norms, sparse_gradient),
)
