"""Which learning rates the healthy programs get: `python -m benchmarks.healthy_rates`, 20 minutes of one core.

A program is healthy only if its learning rate is. Those of the tables of optimizers and of pictures are chosen by one procedure, all of
them, and nobody watches: of the rate that the table names times FACTORS, the one whose loss after as many updates as `make healthy`
makes is least, over seeds that it never uses (its own are below 1000). Prints each, and what goes into BEST.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from statistics import fmean

import torch

from benchmarks import healthy_language, healthy_senses
from benchmarks.programs import Make, Program

STEPS = 60  # updates of each healthy program
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = (1000, 1001)
LAST = 10  # losses whose mean is what was achieved
# by program, where the best of FACTORS is not 1; torch 2.13.0+cpu
BEST = {
    "optimizer radam": 10.0,
    "optimizer adamax": 3.0,
    "optimizer adadelta": 3.0,
    "optimizer rprop": 0.1,
    "optimizer adafactor": 3.0,
    "optimizer muon and adamw": 3.0,
    "optimizer layer-wise lrs": 3.0,
    "optimizer optimi adamw": 3.0,
    "optimizer Lion, pytorch-optimizer": 10.0,
    "optimizer SOAP, pytorch-optimizer": 3.0,
    "optimizer AdEMAMix, pytorch-optimizer": 3.0,
    "optimizer Prodigy, pytorch-optimizer": 0.3,
    "optimizer DAdaptAdam, pytorch-optimizer": 0.1,
    "optimizer AdaPNM, pytorch-optimizer": 3.0,
    "optimizer AdaShift, pytorch-optimizer": 10.0,
    "optimizer ADOPT, pytorch-optimizer": 10.0,
    "optimizer CAME, pytorch-optimizer": 0.1,
    "optimizer DiffGrad, pytorch-optimizer": 3.0,
    "optimizer Fromage, pytorch-optimizer": 3.0,
    "optimizer Grams, pytorch-optimizer": 3.0,
    "optimizer Kate, pytorch-optimizer": 0.01,
    "optimizer LaProp, pytorch-optimizer": 3.0,
    "optimizer MARS, pytorch-optimizer": 3.0,
    "optimizer NovoGrad, pytorch-optimizer": 3.0,
    "optimizer PNM, pytorch-optimizer": 3.0,
    "optimizer ScalableShampoo, pytorch-optimizer": 10.0,
    "optimizer SignSGD, pytorch-optimizer": 10.0,
    "optimizer SM3, pytorch-optimizer": 0.3,
    "optimizer SPlus, pytorch-optimizer": 10.0,
    "optimizer StableAdamW, pytorch-optimizer": 3.0,
    "optimizer Ranger, pytorch-optimizer": 10.0,
    "optimizer EXAdam, pytorch-optimizer": 0.3,
    "optimizer FOCUS, pytorch-optimizer": 3.0,
    "optimizer SimplifiedAdEMAMix, pytorch-optimizer": 10.0,
    "optimizer APOLLO, pytorch-optimizer": 0.3,
    "seeing Dinov2": 0.3,
    "seeing Dinov2WithRegisters": 0.3,
    "seeing IJepa": 10.0,
    "seeing ResNet": 10.0,
    "seeing RegNet": 10.0,
    "seeing ConvNext": 3.0,
    "seeing ConvNextV2": 3.0,
    "seeing PoolFormer": 3.0,
    "seeing Swin": 3.0,
}


def chosen() -> Iterator[tuple[str, Make]]:
    for table in (healthy_language, healthy_senses):
        yield from ((n, make) for n, make in table.programs() if n.startswith(("optimizer ", "seeing ")))


def at_rate(make: Make, factor: float, seed: int) -> Program:
    """The program with learning rates of `factor` times the table's, as if its optimizers had been made with them."""
    program = make(seed)
    for settings in (s for o in program.optimizers for s in (o.defaults, *o.param_groups)):
        if settings.get("lr") is not None:
            settings["lr"] = settings["lr"] * factor
    return program


def achieved(make: Make, factor: float, seed: int) -> float:
    """The loss at the end; infinite where it diverged."""
    torch.manual_seed(seed)
    program = at_rate(make, factor, seed)
    losses = [float(torch.as_tensor(program.step(i)).detach()) for i in range(STEPS)][-LAST:]
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
            except (
                Exception
            ) as error:  # some do not run here, and `make healthy` says so; others diverge beyond what they can compute
                losses[factor] = math.inf
                print(f"{name} at {factor:g}: {error}", flush=True)
        best[name] = min(losses, key=lambda factor: (losses[factor], abs(math.log(factor))))
        told = ", ".join(f"{factor:g}: {loss:.3f}" for factor, loss in losses.items())
        print(f"{name}: {best[name]:g} × ({told})", flush=True)
    print({name: factor for name, factor in best.items() if factor != 1})


if __name__ == "__main__":
    main()
