"""Which learning rates the healthy programs get: `python -m benchmarks.healthy_rates`, 20 minutes of one core.

A program is healthy only if its learning rate is. Those of the tables of optimizers and of pictures are chosen by one procedure, all of
them, and nobody watches: of FACTORS times the rate that the table names, the one whose loss after as many updates as `make healthy`
makes is least, over seeds that it never uses (its own are below 1000). Prints each and the dictionary of factors that are not 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from statistics import fmean

import torch

from benchmarks import healthy_language, healthy_senses
from benchmarks.healthy import STEPS
from benchmarks.programs import Make

FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = (1000, 1001)
LAST = 10  # losses whose mean is what was achieved


def chosen() -> Iterator[tuple[str, Make]]:
    for table in (healthy_language, healthy_senses):
        yield from ((n, make) for n, make in table.programs() if n.startswith(("optimizer ", "seeing ")))


def achieved(make: Make, factor: float, seed: int) -> float:
    """The loss at the end of a program whose learning rates are `factor` times the table's; infinite where it diverged."""
    torch.manual_seed(seed)
    program = make(seed)
    for group in (group for optimizer in program.optimizers for group in optimizer.param_groups):
        if group.get("lr") is not None:
            group["lr"] = group["lr"] * factor
    losses = [float(program.step(i)) for i in range(STEPS)][-LAST:]
    return fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def main() -> None:
    torch.set_num_threads(1)
    best: dict[str, float] = {}
    for name, make in chosen():
        if not any(part in name for part in sys.argv[1:] or [""]):
            continue
        losses = {}
        for factor in FACTORS:
            try:
                losses[factor] = fmean(achieved(make, factor, seed) for seed in SEEDS)
            except (RuntimeError, ValueError) as error:  # a matrix that cannot be inverted any more
                losses[factor] = math.inf
                print(f"{name} at {factor:g}: {error}", flush=True)
        best[name] = min(losses, key=losses.__getitem__)
        told = ", ".join(f"{factor:g}: {loss:.3f}" for factor, loss in losses.items())
        print(f"{name}: {best[name]:g} × ({told})", flush=True)
    print({name: factor for name, factor in best.items() if factor != 1})


if __name__ == "__main__":
    main()
