"""How fast this machine trains, and what each notebook costs on the reference machine."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

from moe_lab.config import ROOT, Config
from moe_lab.train import Trainer

MINUTES = ROOT / "notebooks" / "minutes.json"


def tokens_per_second(config: Config, n_steps: int = 5) -> float:
    """Speed of real training steps of `config`: the median of `n_steps`, after one that is not counted.

    Evaluations and checkpoints are not in it. Files go to a temporary directory; the corpus is prepared if need be.
    """
    with tempfile.TemporaryDirectory() as folder:
        moments = []
        for report in Trainer(config.with_(training={"steps": n_steps + 1}), folder).steps():
            report.grad_norm.item()  # waits for the device
            moments.append(time.perf_counter())
    return config.tokens_per_step / statistics.median(after - before for before, after in pairwise(moments))


def read_minutes() -> dict[str, Any]:
    return json.loads(MINUTES.read_text(encoding="utf-8"))
