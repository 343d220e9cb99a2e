"""What a Watch costs the default run: `make watch-cost`, on an idle machine; a quarter of an hour.

One training of configs/lab.yaml, in which stretches of twenty updates with the watch and without it take turns. Three with it
hold what any sixty updates hold at the defaults: three checks of the rules, and one row in which the order of events is heard;
a pair is three of each. The warm-up sees the first hundred updates, which are looked at more. Writes benchmarks/watch_cost.json.
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

WARM, STRETCH, TURNS, PAIRS = 120, 20, 3, 40  # updates before, and of a stretch; stretches of each kind in a pair


def n_sampled(watch: Watch) -> int:
    """Bytes of what a watch keeps of each tensor."""
    kept = [value for bank in watch.state.banks for value in (*vars(bank).values(), *(t.index for t in bank.tensors))]
    return sum(value.nbytes for value in kept if isinstance(value, torch.Tensor))


def stretch(trainer: Trainer, watch: Watch | None, n_updates: int = STRETCH) -> float:
    """Seconds for so many updates."""
    start = time.perf_counter()
    for report in trainer.steps(until=trainer.step + n_updates):
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
    # each stretch ends with one write of its rows, with the watch and without
    n_updates = WARM + 2 * STRETCH * TURNS * PAIRS
    trainer = Trainer(config.with_(training={"log_interval": STRETCH, "steps": n_updates}), folder)
    watch = Watch(trainer.model, trainer.optimizers, quiet=True)
    stretch(trainer, watch, WARM)  # caches, the optimizers' state
    pairs = []
    for pair in tqdm(range(PAIRS), unit="pair", desc="watch cost"):
        seconds = {True: 0.0, False: 0.0}
        for attached in ((True, False) if pair % 2 else (False, True)) * TURNS:  # whatever drifts, drifts for both
            (watch.attach if attached else watch.close)()
            seconds[attached] += stretch(trainer, watch if attached else None)
        pairs.append([seconds[True], seconds[False]])
    return {
        "compute": trainer.config.precision.compute,
        "updates_per_pair": 2 * STRETCH * TURNS,
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
