"""What a Watch costs the default run: `make watch-cost`, on an idle machine; a few minutes.

One training of configs/lab.yaml, in which stretches of ten updates with the watch and without it take turns: each stretch
with it holds one check of the rules and two looks at the gradients, as every ten updates do at the defaults. Writes
benchmarks/watch_cost.json.
"""

from __future__ import annotations

import tempfile
import time

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import interval
from moe_lab import Trainer, load_config
from moe_lab.config import ROOT
from moe_lab.failures.results import provenance, write_json
from moe_lab.health import Watch

STRETCH, PAIRS = 10, 40  # updates of a stretch, pairs of stretches


def n_sampled(watch: Watch) -> int:
    """Bytes of what a watch keeps of each tensor."""
    kept = [value for bank in watch.state.banks for value in (*vars(bank).values(), *(t.index for t in bank.tensors))]
    return sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


def stretch(trainer: Trainer, watch: Watch | None) -> float:
    """Seconds for ten updates."""
    start = time.perf_counter()
    for report in trainer.steps(until=trainer.step + STRETCH):
        if watch:
            watch.observe(loss=sum(report.losses.values()))
    return time.perf_counter() - start


def n_bytes(trainer: Trainer) -> int:
    """Of the model's parameters and what the optimizers keep."""
    states = [values for optimizer in trainer.optimizers for values in optimizer.state.values()]
    kept = [*trainer.model.parameters(), *(v for s in states for v in s.values() if isinstance(v, Tensor))]
    return sum(t.numel() * t.element_size() for t in kept)


def measure(folder: str) -> dict:
    config = load_config(ROOT / "configs" / "lab.yaml")
    # each stretch ends with one write of its ten rows, with the watch and without
    trainer = Trainer(config.with_(training={"log_interval": STRETCH, "steps": STRETCH * (2 * PAIRS + 1)}), folder)
    watch = Watch(trainer.model, trainer.optimizers, quiet=True)
    stretch(trainer, watch)  # warm: caches, the optimizers' state
    pairs = []
    for pair in tqdm(range(PAIRS), unit="pair", desc="watch cost"):
        seconds = {}
        for attached in (True, False) if pair % 2 else (False, True):  # whatever drifts, drifts for both
            (watch.attach if attached else watch.close)()
            seconds[attached] = stretch(trainer, watch if attached else None)
        pairs.append([seconds[True], seconds[False]])
    return {
        "compute": trainer.config.precision.compute,
        "updates_per_stretch": STRETCH,
        "seconds_with_and_without": pairs,
        "cost": interval([on / off - 1 for on, off in pairs]),
        "bytes": {"watch": n_sampled(watch), "model_and_optimizers": n_bytes(trainer)},
        "bytes_share": n_sampled(watch) / n_bytes(trainer),
        "findings": [f.rule for f in watch.findings if f.severity != "info"],
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = measure(folder)
    median, low, high = (f"{result['cost'][key]:+.2%}" for key in ("median", "low", "high"))
    print(f"time: {median} of an update's (95 %: {low} to {high})")
    print(f"memory: {result['bytes_share']:.2%} of the model's and the optimizers' bytes")
    made = provenance() | {"threads": torch.get_num_threads()}
    write_json(ROOT / "benchmarks" / "watch_cost.json", {"provenance": made, **result})


if __name__ == "__main__":
    main()
