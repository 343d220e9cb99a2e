"""How a measurement is made here: what computes, pairs in turn, medians with intervals, and peak memory."""

from __future__ import annotations

import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lab.optim.products import has_fast_bfloat16
from moe_lab.plan import Live

# in inference mode torch shows linear and matmul whole, and else what they are made of
PRODUCT = re.compile(r"(mm|bmm|addmm|baddbmm|mv|addmv|linear|matmul|_grouped_mm|_?scaled_dot_product\w*)$")


def interval(values: Sequence[float]) -> dict[str, float]:
    """The median with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    names = ("median", "low", "high")
    return dict(zip(names, (round(float(v), 4) for v in (statistics.median(values), low, high)), strict=True))


def cpu_seconds() -> float:
    """CPU time so far, that of processes which have ended included."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def seconds(call: Callable[[], object]) -> float:
    """Of one thread CPU time, which other processes do not lengthen; of several, whose waiting counts as work, the wall's."""
    clock = cpu_seconds if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def paired(ours: Callable[[], object], peer: Callable[[], object], pairs: int) -> dict:
    """Both in turn, the order changed each time, after a call of each that does not count: medians in seconds, how many
    times as long the peer takes and how many seconds less, with intervals over pairs."""
    calls = {"ours_s": ours, "peer_s": peer}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for pair in range(pairs):
        for name in list(calls)[:: -1 if pair % 2 else 1]:
            times[name].append(seconds(calls[name]))
    both = list(zip(*times.values(), strict=True))
    medians = {name: round(statistics.median(values), 5) for name, values in times.items()}
    over = {"times_faster": [b / a for a, b in both], "seconds_more": [a - b for a, b in both]}
    return medians | {name: interval(values) for name, values in over.items()} | {"pairs": pairs}


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that the tensors made in a call held at once. (torch's profiler needs gigabytes for a loop over 1024 tokens.)"""
    with Live() as live:
        call()
    return live.most


class Products(TorchDispatchMode):
    """Adds up the CPU time of matrix products, attention among them, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        start = time.process_time()
        result = function(*args, **kwargs or {})
        if PRODUCT.match(function.overloadpacket.__name__):
            self.seconds += time.process_time() - start
        return result


def products_share(call: Callable[[], object]) -> float:
    """Of a call's CPU time that of its matrix products: what is left if all else takes none."""
    call()
    start = time.process_time()
    call()
    whole = time.process_time() - start
    with Products() as products:
        call()
    return min(1.0, products.seconds / whole)


def computes() -> list[str]:
    """The dtypes that are compared here."""
    return ["float32", "bfloat16"] if has_fast_bfloat16(torch.device("cpu")) else ["float32"]
