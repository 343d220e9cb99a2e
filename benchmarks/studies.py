"""Compute committed results anew: `make studies`, hours of one core; finished cells are kept in .cache.

python -m benchmarks.studies [NAME …]      # of `moe_lab.failures.designs`, and `disputed`
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moe_lab.failures.designs import all_designs, study_config, with_lrs
from moe_lab.failures.experiments import SEEDS, Arm, Experiment, collect
from moe_lab.failures.results import RESULTS
from moe_lab.sections import ConfigError, suggestion
from moe_lab.train.command import exit_code


def disputed() -> Experiment:
    """Two rows of benchmarks/detection.py were written as mixed-up conventions and are named for their learning rate. How much
    does the other convention give back of what, in the same, the LR does that the sweeps found best? Arms:
    `match_rms_adamw 0.05, 96`, `…, convention repaired`, `…, LR repaired`, and the same of `original 0.0003, 384`."""
    arms = {}
    for d_model, compute, lr, convention, other, best in (
        (96, "bfloat16", 0.05, "match_rms_adamw", "original", 3e-3),
        (384, "float32", 3e-4, "original", "match_rms_adamw", 1e-2),
    ):
        config = study_config(d_model, compute=compute)
        name, adamw = f"{convention} {lr:g}, {d_model}", 3e-3  # AdamW's LR is that of the rows
        arms[name] = Arm(with_lrs(config, lr, adamw, convention))
        arms[f"{name}, convention repaired"] = Arm(with_lrs(config, lr, adamw, other))
        arms[f"{name}, LR repaired"] = Arm(with_lrs(config, best, adamw, convention))
    return Experiment(name="disputed", arms=arms, seeds=SEEDS[:2], evaluate_at=(100,))


def compute(names: Sequence[str]) -> None:
    """Compute these designs, or all, and write their results for committing."""
    designs = {design.name: design for design in (*all_designs(), disputed())}
    for name in names or designs:
        if name not in designs:
            known = suggestion(name, designs) or "; there are " + ", ".join(designs)
            raise ConfigError(f"{name!r} is not a design{known}")
        results = collect(designs[name], redo=True)
        results.save(RESULTS / f"{name}.json")
        print(results.provenance(), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(compute, sys.argv[1:]))
