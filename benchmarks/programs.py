"""What a training is, to those who watch it: a model, its optimizers, and a function that makes one update. Data for them.

Programs are built of a seed alone, in tables of rows; `watched` runs one under examine and a Watch at their defaults, and `kept`
computes each row once for each content of the files that it follows from, so that an interrupted table goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from moe_lab.config import ROOT, DataConfig
from moe_lab.data.corpus import read_corpus
from moe_lab.data.prepare import CACHE
from moe_lab.failures.results import provenance
from moe_lab.health import Watch, examine
from moe_lab.train.record import write_atomically

IGNORED = -100  # a label that is no target, as torch and transformers have it


class Program(NamedTuple):
    model: nn.Module
    optimizers: Sequence[Optimizer]
    step: Callable[[int], Tensor | float]  # makes update i (from 0) and returns its loss
    examined: tuple[Any, Callable | None] | None = None  # a batch and a loss, where there is one
    options: Mapping[str, Any] = {}  # of Watch
    held_out: Callable[[], float] | None = None  # what the run achieved, where a training loss would not tell
    config: Mapping[str, Any] | None = None  # for examine


Make = Callable[[int], Program]  # of a seed


def update(optimizers: Optimizer | Sequence[Optimizer], loss: Tensor, clip: float | None = 1.0) -> Tensor:
    """One update, as most scripts make it: zero_grad, backward, clip, step."""
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    for o in optimizers:
        o.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], clip)
    for o in optimizers:
        o.step()
    return loss


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return model(**batch).loss


def picture_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    shown = model(batch[0])
    return F.cross_entropy(getattr(shown, "logits", shown), batch[1])


def plain(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Callable[[], Any],
    loss: Callable,
    clip: float | None = 1.0,
    **options: Any,
) -> Program:
    """Batches, a loss of (model, batch), and nothing else; examined first."""
    return Program(
        model, [optimizer], lambda i: update(optimizer, loss(model, batches()), clip), (batches(), loss), options
    )


# ---- data ------------------------------------------------------------------------------------------------------------


@cache
def text() -> Tensor:
    """The corpus' bytes, (N,) int64."""
    corpus = read_corpus(DataConfig(max_bytes=2_000_000), progress=False)
    return torch.frombuffer(bytearray("".join(corpus.train).encode()), dtype=torch.uint8).long()


class Rows:
    """Windows of the corpus' bytes, (B, T) int64, in an order that follows from the seed."""

    def __init__(self, seed: int, batch: int = 8, length: int = 64):
        self.generator = torch.Generator().manual_seed(seed + 1000)
        self.batch, self.length = batch, length

    def __call__(self) -> Tensor:
        at = torch.randint(len(text()) - self.length, (self.batch, 1), generator=self.generator)
        return text()[at + torch.arange(self.length)]


class Masked(Rows):
    """The same with 15 % of the bytes replaced by byte 255, which are the targets; keyword arguments of a masked model."""

    def __call__(self) -> dict[str, Tensor]:
        ids = super().__call__()
        hidden = torch.rand(ids.shape, generator=self.generator) < 0.15
        return {"input_ids": ids.where(~hidden, 255), "labels": ids.where(hidden, IGNORED)}


@cache
def glyphs() -> tuple[Tensor, Tensor]:
    """Letters and digits in matplotlib's own fonts, drawn at 24 × 24: (N, 1, 24, 24) in 0 … 1 and classes (N,)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted(folder.glob("DejaVu*.ttf")) + sorted(folder.glob("STIXGeneral*.ttf"))
    pictures = []
    for path, size, letter in product(paths, (14, 17, 20), "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"):
        picture = Image.new("L", (24, 24))
        font = ImageFont.truetype(str(path), size)
        ImageDraw.Draw(picture).text((12, 12), letter, fill=255, font=font, anchor="mm")
        pictures.append(np.asarray(picture, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(pictures)).unsqueeze(1), torch.arange(len(pictures)) % 36


class Pictures:
    """Glyphs and their classes, normalised: (B, C, size, size) and (B,); of the first `n_classes` letters."""

    def __init__(self, seed: int, batch: int = 32, channels: int = 1, size: int = 24, n_classes: int = 36):
        self.generator = torch.Generator().manual_seed(seed + 1000)
        self.batch, self.channels, self.size, self.n_classes = batch, channels, size, n_classes

    def __call__(self) -> tuple[Tensor, Tensor]:
        pictures, classes = glyphs()
        fonts = torch.randint(len(pictures) // 36, (self.batch,), generator=self.generator)
        rows = 36 * fonts + torch.randint(self.n_classes, (self.batch,), generator=self.generator)
        shown = (pictures[rows] - 0.13) / 0.29
        if self.size != 24:
            shown = nn.functional.interpolate(shown, (self.size, self.size), mode="bilinear")
        return shown.expand(-1, self.channels, -1, -1).contiguous(), classes[rows]


# ---- running ---------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return round(float(value), 5) if isinstance(value, (int, float)) and math.isfinite(value) else None


def ends(losses: Sequence[float]) -> list[float | None]:
    """Mean of the first five losses and of the last ten: what a run achieved."""
    first, last = losses[:5], losses[-10:]
    return [number(sum(part) / max(1, len(part))) for part in (first, last)]


def watched(make: Make, seed: int, steps: int) -> dict[str, Any]:
    """What examine and a Watch find in a program of so many updates, and how its loss ran."""
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    program = make(seed)
    found, not_checked = [], {}
    began = time.process_time()
    if program.examined:
        batch, loss_fn = program.examined
        examination = examine(program.model, batch, loss_fn, program.optimizers, program.config)
        found, not_checked = examination.findings, examination.not_checked
    examined_s = time.process_time() - began
    with Watch(program.model, program.optimizers, quiet=True, **program.options) as watch:
        losses = []
        for i in range(steps):
            loss = program.step(i)
            losses.append(float(loss))
            watch.observe(loss=loss)
    return {
        "findings": [["examine", *told(f)] for f in found] + [["watch", *told(f)] for f in watch.findings],
        "not_checked": sorted(not_checked),
        "losses": ends(losses),
        "held_out": achieved(program),
        "updates": watch.step,
        "seconds": [round(examined_s, 2), round(time.process_time() - began, 2)],
    }


def trained(make: Make, seed: int, steps: int) -> dict[str, Any]:
    """The same run with nobody watching: its losses."""
    torch.manual_seed(seed)
    warnings.simplefilter("ignore")
    program = make(seed)
    losses = [float(program.step(i)) for i in range(steps)]
    return {"losses": ends(losses), "held_out": achieved(program)}


def achieved(program: Program) -> float | None:
    return number(program.held_out()) if program.held_out else None


def told(finding: Any) -> list:
    return [finding.rule, finding.severity, finding.step, finding.where, number(finding.value), finding.message[:200]]


class Job(NamedTuple):
    """A row of a table: what it is called, how it is computed, and the files that its result follows from."""

    name: str
    seed: int
    compute: Callable[[], dict[str, Any]]
    sources: Sequence[Path]
    own: str = ""  # source of its own, beside these files

    @property
    def key(self) -> str:
        content = "".join(path.read_text(encoding="utf-8") for path in self.sources)
        return hashlib.sha256(f"{self.name} {self.seed} {self.own} {content}".encode()).hexdigest()[:24]


def sources_of(*modules: str) -> list[Path]:
    """The files of these modules of benchmarks/, and this one."""
    return [Path(__file__), *(Path(__file__).parent / f"{module}.py" for module in modules)]


HEALTH = sorted((ROOT / "moe_lab" / "health").rglob("*.py"))
JOBS: list[Job] = []  # of the table that is computed now: forked processes find it here


def compute(index: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    job = JOBS[index]
    row = {"name": job.name, "seed": job.seed}
    try:
        row |= job.compute()
    except Exception as error:  # a program that does not run here is a row of its own
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    row["commit"] = provenance()["commit"]
    path = CACHE / "evidence" / f"{job.key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(row))
    return row


def alarms(run: dict[str, Any]) -> list[list]:
    """A run's findings of at least `warning`, examine's first, then the watch's by update: who, rule, severity, step, where, value,
    message."""
    return [finding for finding in run.get("findings", ()) if finding[2] != "info"]


def kept(jobs: Iterable[Job], desc: str) -> list[dict[str, Any]]:
    """The rows of these jobs in their order; those computed before from the same files are read. `JOBS=n` processes."""
    JOBS[:] = jobs
    paths = [CACHE / "evidence" / f"{job.key}.json" for job in JOBS]
    rows = {i: json.loads(path.read_text()) for i, path in enumerate(paths) if path.exists()}
    missing = [i for i in range(len(JOBS)) if i not in rows]
    n_processes = int(os.environ.get("JOBS") or os.cpu_count() or 1)
    with ProcessPoolExecutor(n_processes, multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(compute, i): i for i in missing}
        for future in tqdm(as_completed(futures), total=len(missing), unit="run", desc=desc):
            rows[futures[future]] = future.result()
    return [rows[i] for i in range(len(JOBS))]
