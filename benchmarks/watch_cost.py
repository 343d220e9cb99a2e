"""What a Watch costs the default run: `make watch-cost`, on an idle machine; a few minutes.

One training of configs/lab.yaml, in which stretches of ten updates with the watch and without it take turns: each stretch
with it holds one check of the rules and two looks at the gradients, as every ten updates do at the defaults. Writes
benchmarks/watch_cost.json. Two numbers: stretch against stretch, which holds everything and the machine's noise, and the
time inside the watch's own functions, which holds no noise and no effects on what runs after them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_lab import build_model, load_config
from moe_lab.data import Batches, prepare
from moe_lab.health import Watch
from moe_lab.optim import build_optimizers, groups_of, lr_share
from moe_lab.train.device import pick_compute
from moe_lab.train.loop import commit

ROOT = Path(__file__).resolve().parents[1]
STRETCH = 10  # updates
LIMITS = {"time": 0.03, "bytes": 0.02}  # shares that the watch may cost


class Timed(Watch):
    """A watch that adds up the seconds spent in it."""

    seconds = 0.0

    def before_step(self, *args) -> None:
        start = time.perf_counter()
        super().before_step(*args)
        self.seconds += time.perf_counter() - start

    def after_step(self, *args) -> None:
        start = time.perf_counter()
        super().after_step(*args)
        self.seconds += time.perf_counter() - start


class Run:
    """The default run, an update at a time."""

    def __init__(self) -> None:
        config = load_config(ROOT / "configs" / "lab.yaml")
        dataset = prepare(config.data, config.model)
        config = config.with_(model={"vocab_size": dataset.vocab_size})
        self.training, seed = config.training, config.training.seed
        self.model = build_model(config.model, seed).train()
        self.optimizers = build_optimizers(self.model, config.optimizer, self.training.max_lr)
        self.batches = Batches(dataset.train, config.model.max_seq_len, self.training.batch_size, seed)
        self.compute = pick_compute(config, torch.device("cpu"))
        self.step = 0

    def update(self) -> Tensor:
        self.step += 1
        share = lr_share(self.step, self.training.steps, self.training.warmup_steps, self.training.min_lr_ratio)
        for group in groups_of(self.optimizers):
            group["lr"] = share * group["initial_lr"]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.compute == "bfloat16"):
            loss = sum(self.model.losses(self.batches.next_batch()).values())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def stretch(self, watch: Watch | None) -> float:
        """Seconds for ten updates."""
        start = time.perf_counter()
        for _ in range(STRETCH):
            loss = self.update()
            if watch:
                watch.observe(loss=loss)
        return time.perf_counter() - start

    def n_bytes(self) -> int:
        """Of the model's parameters and what the optimizers keep."""
        kept = [*self.model.parameters()]
        kept += [v for o in self.optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in kept)


def measure(n_pairs: int) -> dict:
    run = Run()
    watch = Timed(run.model, run.optimizers)
    run.stretch(watch)  # warm: caches, the optimizers' state
    watch.seconds, pairs, inside = 0.0, [], []
    for pair in tqdm(range(n_pairs), unit="pair", desc="watch cost"):
        seconds = {}
        for attached in (True, False) if pair % 2 else (False, True):  # whatever drifts, drifts for both
            if attached:
                watch.attach()
                watch.seconds = 0.0
            else:
                watch.close()
            seconds[attached] = run.stretch(watch if attached else None)
        pairs.append([seconds[True], seconds[False]])
        inside.append(watch.seconds / seconds[False])
    return {
        "compute": run.compute,
        "updates_per_stretch": STRETCH,
        "seconds_with_and_without": pairs,
        "cost": interval([on / off - 1 for on, off in pairs]),
        "cost_inside": interval(inside),
        "bytes": {"watch": watch.n_bytes(), "model_and_optimizers": run.n_bytes()},
        "bytes_share": watch.n_bytes() / run.n_bytes(),
        "limits": LIMITS,
        "findings": [f.rule for f in watch.findings if f.severity != "info"],
    }


def interval(values: list[float]) -> dict[str, float]:
    """The median with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return {"median": statistics.median(values), "low": float(low), "high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="of stretches; fewer than 10 print, and write nothing")
    n_pairs = parser.parse_args().pairs
    torch.manual_seed(0)
    result = measure(n_pairs)
    for name, text in (("cost", "stretch against stretch"), ("cost_inside", "inside the watch")):
        found = result[name]
        print(
            f"{text}: {found['median']:+.2%} of the time of an update (95 %: {found['low']:+.2%} to {found['high']:+.2%})"
        )
    print(f"memory: {result['bytes_share']:.2%} of the model's and the optimizers' bytes")
    if n_pairs >= 10:
        origin = {"commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        origin |= {"python": platform.python_version(), "machine": platform.machine()}
        text = json.dumps({"provenance": origin, **result}, indent=2) + "\n"
        (ROOT / "benchmarks" / "watch_cost.json").write_text(text)


if __name__ == "__main__":
    main()
