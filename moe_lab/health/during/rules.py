"""The rules of a watch, in the order in which they are asked.

Limits stand on top of the file whose rule has them, those that several rules share in state.py and tracking.py, and nowhere
else. They were chosen on one half of the runs of `make detection` and judged on the other (benchmarks/detection.json).
"""

from . import (
    rules_flow,
    rules_loss,
    rules_ranks,
    rules_schedule,
    rules_setup,
    rules_signal,
    rules_start,
    rules_steps,
    rules_units,
    rules_updates,
)

# In order of certainty: a broken set-up explains what comes after it.
AT_START = (*rules_setup.RULES, *rules_start.RULES)
ALL = (*AT_START, *rules_ranks.RULES, *rules_schedule.RULES, rules_steps.lost_decay, *rules_updates.RULES)
ALL += (*rules_signal.RULES, *rules_updates.STILL)
ALL += (*rules_steps.RULES, *rules_units.RULES, *rules_flow.RULES, *rules_steps.SIZES, *rules_loss.RULES)
ALL += (rules_flow.token_weights, rules_updates.direction_bias, rules_loss.reach)
