"""What this machine gives: what is installed, how fast it trains, and from that the minutes of each notebook."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from itertools import pairwise
from typing import Any

from packaging.requirements import Requirement

from moe_lab.config import ROOT, Config
from moe_lab.train import Trainer

MINUTES = ROOT / "notebooks" / "minutes.json"


def unmet_requirements(extra: str = "lab") -> list[str]:
    """What pyproject asks for, the extra's packages included, and this Python does not have; empty: all is there."""
    unmet = []
    for requirement in map(Requirement, metadata.requires("moe-lab") or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name}{requirement.specifier} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier}, found {version}")
    return unmet


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


def estimated_minutes(measured: Mapping[str, Any], profile: str, speed: float) -> dict[str, float | None]:
    """Minutes of each notebook here, by its name; None where the reference machine has not measured it.

    `measured` is the content of MINUTES: minutes of the notebooks and tokens per second on a reference machine, by
    profile. `speed` is this machine's, in tokens per second. Everything is taken to scale with the training speed.
    """
    factor = (measured["reference"]["tokens_per_s"].get(profile) or 0) / speed
    minutes = {name: by_profile.get(profile) or 0 for name, by_profile in measured["notebooks"].items()}
    return {name: factor * here or None for name, here in minutes.items()}


def read_minutes() -> dict[str, Any]:
    return json.loads(MINUTES.read_text(encoding="utf-8"))
