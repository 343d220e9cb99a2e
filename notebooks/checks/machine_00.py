"""What notebook 00 asks of the machine: what is there, how fast it multiplies, and what each notebook costs here."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from itertools import pairwise
from typing import Any

import psutil
import torch
from IPython.display import Markdown, display
from packaging.requirements import Requirement

from moe_lab.config import ROOT, Config
from moe_lab.course.notebook import Lab
from moe_lab.course.runner import all_notebooks
from moe_lab.show.front import is_interactive
from moe_lab.train import Trainer
from moe_lab.train.device import pick_compute, seconds_per_product

MINUTES = ROOT / "notebooks" / "minutes.json"


def facts(lab: Lab) -> dict[str, str]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(lab.root)
    return {
        "Python": f"{platform.python_version()}, torch {torch.__version__}, device {lab.device.type}",
        "cores": f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}",
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "disk": f"{disk.free / 1e9:.0f} GB free",
        "git": "found" if shutil.which("git") else "not found: runs will not know their commit",
        "someone watches": "yes: live controls" if is_interactive() else "no: one figure at the end of a run",
    }


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


def product_speeds(lab: Lab) -> dict[str, float]:
    """Operations a second of a matrix product as wide as the profile's model has them, by number format."""
    model, training = lab.config.model, lab.config.training
    rows = min(training.batch_size * model.max_seq_len, 4096)
    a, b = torch.ones(rows, model.d_model, device=lab.device), torch.ones(model.d_model, model.d_ff, device=lab.device)
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    n = 2 * rows * model.d_model * model.d_ff
    return {name: n / seconds_per_product(a.to(dtype), b.to(dtype)) for name, dtype in formats.items()}


def compute_format(lab: Lab) -> str:
    return pick_compute(lab.config, lab.device)


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


def estimated_minutes(measured: Mapping[str, Any], profile: str, speed: float) -> dict[str, float | None]:
    """Minutes of each notebook here, by its name; None where the reference machine has not measured it.

    `measured` is the content of MINUTES: minutes of the notebooks and tokens per second on a reference machine, by
    profile. `speed` is this machine's, in tokens per second. Everything is taken to scale with the training speed.
    """
    factor = (measured["reference"]["tokens_per_s"].get(profile) or 0) / speed
    minutes = {name: by_profile.get(profile) or 0 for name, by_profile in measured["notebooks"].items()}
    return {name: factor * here or None for name, here in minutes.items()}


def show_estimate(profile: str, speed: float) -> None:
    """A table of all notebooks with their questions and their minutes here; `speed` in tokens per second."""
    measured = read_minutes()
    here = estimated_minutes(measured, profile, speed)
    table = ["| notebook | question | minutes here |", "| --- | --- | --- |"]
    for path in all_notebooks():
        first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0]
        minutes = here.get(path.stem)
        shown = "not measured yet" if minutes is None else f"{minutes:.1f}"
        table.append(f"| [{path.stem}]({path.name}) | {first.split('·', 1)[-1].strip()} | {shown} |")
    print("reference machine:", measured["reference"]["machine"] or "not measured yet")
    display(Markdown("\n".join(table)))


def short(value: Any) -> Any:
    """A reading of a record with four digits of each number, to be printed."""
    return json.loads(json.dumps(value), parse_float=lambda text: float(f"{float(text):.4g}"))
