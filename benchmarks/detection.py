"""Does the watch name each sickness by step 100, and keep quiet about healthy runs? `make detection`.

Every row is a training of 100 updates, three seeds each, watched at the defaults. The rows are in two halves: the thresholds
in moe_lab/health were chosen while only the first half was run (`--half calibration`); the second half judges them. Prints a
table and writes benchmarks/detection.json. On two cores it takes about a quarter of an hour. `--missing` runs only the rows
that the file does not have, and adds them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from moe_lab import build_model, load_config
from moe_lab.config import Config
from moe_lab.data import Batches, prepare
from moe_lab.failures import bugs
from moe_lab.failures.designs import at, study_config
from moe_lab.health import SICKNESSES, Watch
from moe_lab.optim import build_optimizers, groups_of, lr_share
from moe_lab.optim.rounding import REMEDIES
from moe_lab.train.loop import commit

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "detection.json"
STEPS, SEEDS = 100, (0, 1, 2)
BASE = (0.01, 0.003)  # Muon's and AdamW's LR of the healthy recipe; what is "10 times low" is counted from here


class Run(NamedTuple):
    """What a row trains: a model, its optimizers, the loss of a batch, LR shares by update, and what is frozen on purpose."""

    model: nn.Module
    optimizers: list[Optimizer]
    batch_loss: Callable[[], torch.Tensor]
    share: Callable[[int], float]
    expect_frozen: tuple[str, ...] = ()
    budget: int | None = None


def warm(step: int) -> float:
    return min(1.0, step / 20)


# ---- language models -------------------------------------------------------------------------------------------------


def batches(config: Config, seed: int) -> tuple[Config, Batches]:
    dataset = prepare(config.data, config.model, progress=False)
    config = config.with_(model={"vocab_size": dataset.vocab_size})
    return config, Batches(dataset.train, config.model.max_seq_len, config.training.batch_size, seed)


def loss_of(model: nn.Module, stream: Batches, compute: str = "bfloat16") -> Callable[[], torch.Tensor]:
    def batch_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
            return sum(model.losses(stream.next_batch()).values())

    return batch_loss


def language(seed: int, config: Config, remedy: str | None = None, share: Callable[[int], float] = warm) -> Run:
    config, stream = batches(config, seed)
    model = build_model(config.model, seed)
    if remedy:
        optimizers = REMEDIES[remedy](model, config.optimizer, config.training.max_lr)
    else:
        if config.precision.parameters == "bfloat16":
            bugs.cast_parameters(model)
        optimizers = build_optimizers(model, config.optimizer, config.training.max_lr)
    return Run(model.train(), optimizers, loss_of(model, stream, config.precision.compute), share)


def one_adamw(seed: int, lr: float = 1e-3, cast: bool = False, kind: type = AdamW, **options: Any) -> Run:
    """All parameters in one optimizer, as most training scripts have it."""
    run = language(seed, study_config(96))
    if cast:
        bugs.cast_parameters(run.model)
    optimizer = kind(run.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, **options)
    return run._replace(optimizers=[optimizer])


def without_group(seed: int, name: str) -> Run:
    run = language(seed, at(study_config(96), *BASE))
    return run._replace(optimizers=bugs.forget_group(run.optimizers, name))


def with_detached(seed: int, path: str) -> Run:
    run = language(seed, at(study_config(96), *BASE))
    bugs.detach_output(run.model.get_submodule(path))
    return run


def with_frozen(seed: int, prefix: str) -> Run:
    """Frozen before the optimizers are made, which then skip it."""
    config, stream = batches(at(study_config(96), *BASE), seed)
    model = build_model(config.model, seed)
    bugs.freeze(model, prefix)
    optimizers = build_optimizers(model, config.optimizer, config.training.max_lr)
    return Run(model.train(), optimizers, loss_of(model, stream), warm)


def trained(seed: int, steps: int) -> Run:
    """A healthy run, some way on."""
    run = language(seed, at(study_config(96), *BASE))
    for step in range(1, steps + 1):
        update(run, step)
    return run


def cosine_end(seed: int) -> Run:
    """Watched over the last 100 of 300 updates, with the optimizers it has trained with."""
    run = language(seed, at(study_config(96), *BASE))
    run = run._replace(share=lambda step: lr_share(step, 300, 20, 0.01))
    for step in range(1, 201):
        update(run, step)
    return run._replace(share=lambda step: lr_share(200 + step, 300, 20, 0.01))


def fine_tuning(seed: int) -> Run:
    """A model trained for 200 updates goes on at AdamW 1e-5 on text it has not seen, as one would adapt it."""
    model = trained(seed, 200).model
    dataset = prepare(study_config(96).data, study_config(96).model, progress=False)
    stream = Batches(dataset.validation, 128, 8, seed)
    optimizer = AdamW(model.parameters(), lr=1e-5)
    return Run(model, [optimizer], loss_of(model, stream), warm, budget=1000)


class Adapter(nn.Module):
    """A low-rank addition to a frozen linear map (Hu et al. 2021, sec. 4.1); its second factor starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapters(seed: int, declared: bool = True) -> Run:
    model = trained(seed, 200).model.requires_grad_(False)
    torch.manual_seed(seed)
    for block in model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(block.seq_layer, name, Adapter(getattr(block.seq_layer, name)))
    names = tuple(name for name, p in model.named_parameters() if not p.requires_grad)
    dataset = prepare(study_config(96).data, study_config(96).model, progress=False)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    return Run(
        model, [optimizer], loss_of(model, Batches(dataset.validation, 128, 8, seed)), warm, names if declared else ()
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


def glyphs() -> tuple[torch.Tensor, torch.Tensor]:
    """Letters and digits in matplotlib's own fonts, drawn at 24 × 24: (N, 1, 24, 24) in 0 … 1 and classes (N,)."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pictures, classes = [], []
    for path in sorted(folder.glob("DejaVu*.ttf")) + sorted(folder.glob("STIXGeneral*.ttf")):
        for size in (14, 17, 20):
            font = ImageFont.truetype(str(path), size)
            for index, letter in enumerate(letters):
                picture = Image.new("L", (24, 24))
                ImageDraw.Draw(picture).text((12, 12), letter, fill=255, font=font, anchor="mm")
                pictures.append(np.asarray(picture, dtype=np.float32) / 255)
                classes.append(index)
    return torch.from_numpy(np.stack(pictures)).unsqueeze(1), torch.tensor(classes)


def convolutional(seed: int) -> Run:
    """A small CNN with batch norm, by SGD with momentum."""
    pictures, classes = glyphs()
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for n_in, n_out in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 9, 36))
    generator = torch.Generator().manual_seed(seed)

    def batch_loss() -> torch.Tensor:
        rows = torch.randint(len(pictures), (64,), generator=generator)
        return F.cross_entropy(model(pictures[rows]), classes[rows])

    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return Run(model, [optimizer], batch_loss, warm)


# ---- the table -------------------------------------------------------------------------------------------------------


def times(factor: float) -> Callable[[int], Run]:
    """The healthy recipe with every learning rate multiplied."""
    return partial(language, config=at(study_config(96), BASE[0] * factor, BASE[1] * factor))


def in_bf16(lrs: tuple[float, float]) -> Callable[[int], Run]:
    return partial(language, config=at(study_config(96), *lrs, parameters="bfloat16"))


def lab(seed: int) -> Run:
    return language(seed, load_config(ROOT / "configs" / "lab.yaml"))


def optimi_kahan(seed: int) -> Run:
    import optimi

    return one_adamw(seed, cast=True, kind=optimi.AdamW)


class Row(NamedTuple):
    name: str
    sickness: str | None  # a key of health.SICKNESSES; None: healthy
    half: str  # calibration or judged
    make: Callable[[int], Run]


ROWS = [
    Row("bf16 parameters, Muon and AdamW at the report's LRs", "bf16 parameters", "calibration", in_bf16((1e-3, 3e-4))),
    Row("bf16 parameters, AdamW (foreach)", "bf16 parameters", "judged", partial(one_adamw, cast=True, foreach=True)),
    Row("bf16 parameters, AdamW (fused)", "bf16 parameters", "judged", partial(one_adamw, cast=True, fused=True)),
    Row("bf16 parameters, Muon and AdamW at good LRs", "bf16 parameters", "judged", in_bf16(BASE)),
    Row("learning rates 10 × low", "LR too low", "calibration", times(1 / 10)),
    Row("learning rates 67 × low", "LR too low", "judged", times(1 / 67)),
    Row("AdamW alone 10 × low", "LR too low", "judged", partial(one_adamw, lr=1e-4)),
    Row("learning rates 20 × high", "LR too high", "calibration", times(20)),
    Row("AdamW alone 20 × high", "LR too high", "judged", partial(one_adamw, lr=4e-2)),
    Row("AdamW's LR for Muon in `original`", "conventions mixed up", "calibration",
        partial(language, config=at(study_config(192), 1e-3, BASE[1]))),
    # judged first, and missed by the limit of that day (Muon at 30 × in either convention); then moved to this half
    Row("an `original` 0.03 in match_rms_adamw", "conventions mixed up", "calibration",
        partial(language, config=at(study_config(192), 0.03, BASE[1], "match_rms_adamw"))),
    Row("an `original` 0.05 in match_rms_adamw, width 96", "conventions mixed up", "judged",
        partial(language, config=at(study_config(96), 0.05, BASE[1], "match_rms_adamw"))),
    Row("the published 0.02 in match_rms_adamw, width 288", "conventions mixed up", "judged",
        partial(language, config=at(study_config(288), 0.02, BASE[1], "match_rms_adamw"))),
    # wider, where the conventions are further apart; in float32, because they were run where bf16 products are slow
    Row("AdamW's 3e-4 for Muon in `original`, width 384", "conventions mixed up", "judged",
        partial(language, config=at(study_config(384, compute="float32"), 3e-4, BASE[1]))),
    Row("the published 0.02 in match_rms_adamw, width 384", "conventions mixed up", "judged",
        partial(language, config=at(study_config(384, compute="float32"), 0.02, BASE[1], "match_rms_adamw"))),
    Row("embeddings and heads in no optimizer", "group missing", "calibration", partial(without_group, name="adamw_decayed")),
    Row("norms in no optimizer", "group missing", "judged", partial(without_group, name="adamw")),
    Row("a feed-forward branch detached", "branch detached", "calibration", partial(with_detached, path="layers.1.ffn")),
    Row("an attention's values detached", "branch detached", "judged", partial(with_detached, path="layers.2.seq_layer.v_proj")),
    Row("a block frozen by accident", "frozen by accident", "calibration", partial(with_frozen, prefix="layers.1.")),
    Row("the embedding frozen by accident", "frozen by accident", "judged", partial(with_frozen, prefix="embedding.")),
    Row("tuned Muon: the lab's default run", None, "calibration", lab),
    Row("plain AdamW", None, "judged", one_adamw),
    Row("match_rms_adamw", None, "judged", partial(language, config=at(study_config(96), 3e-3, BASE[1], "match_rms_adamw"))),
    Row("a warm-up of 200 updates", None, "calibration",
        partial(language, config=at(study_config(96), *BASE), share=lambda step: min(1.0, step / 200))),
    Row("the end of a cosine", None, "judged", cosine_end),
    Row("fine-tuning at 1e-5", None, "judged", fine_tuning),
    Row("adapters on a frozen base", None, "calibration", adapters),
    Row("a CNN by SGD", None, "judged", convolutional),
    Row("bf16, stochastic rounding", None, "judged", partial(language, config=at(study_config(96), *BASE), remedy="stochastic")),
    Row("bf16, Kahan summation", None, "calibration", partial(language, config=at(study_config(96), *BASE), remedy="kahan")),
    Row("bf16, optimi's AdamW (Kahan)", None, "judged", optimi_kahan),
]  # fmt: skip


def update(run: Run, step: int) -> torch.Tensor:
    for group in groups_of(run.optimizers):
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * run.share(step)
    loss = run.batch_loss()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def watched(index: int, seed: int) -> dict[str, Any]:
    """One row with one seed: every finding that the watch made in 100 updates."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    row = ROWS[index]
    run = row.make(seed)
    losses = []
    with Watch(run.model, run.optimizers, budget=run.budget, expect_frozen=run.expect_frozen) as watch:
        for step in range(1, STEPS + 1):
            losses.append(update(run, step))
            watch.observe(loss=losses[-1])
        watch.check()
    serious = [f for f in watch.findings if f.severity != "info"]
    return {
        "row": row.name,
        "half": row.half,
        "sickness": row.sickness,
        "seed": seed,
        "first": [serious[0].rule, serious[0].severity, serious[0].step] if serious else None,
        "findings": [
            [
                f.rule,
                f.severity,
                f.step,
                f.where,
                f.value if isinstance(f.value, (int, float)) and math.isfinite(f.value) else None,
            ]
            for f in watch.findings
        ],
        "first_loss": losses[0].item(),
        "last_loss": torch.stack(losses[-10:]).mean().item(),
        "commit": commit(),
    }


def is_right(result: dict[str, Any]) -> bool:
    """Sick: the first finding of at least warning names the cause. Healthy: no error."""
    if result["sickness"]:
        return bool(result["first"]) and result["first"][0] == SICKNESSES[result["sickness"]]
    return all(severity != "error" for _, severity, *_ in result["findings"])


def summary(results: list[dict[str, Any]], half: str) -> dict[str, Any]:
    mine = [r for r in results if r["half"] == half]
    sick, healthy = [r for r in mine if r["sickness"]], [r for r in mine if not r["sickness"]]
    return {
        "sick_runs": len(sick),
        "right_cause": sum(map(is_right, sick)),
        "healthy_runs": len(healthy),
        "with_error": sum(not is_right(r) for r in healthy),
        "with_warning": sum(any(f[1] == "warning" for f in r["findings"]) for r in healthy),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=("calibration", "judged"), help="only one half of the rows")
    parser.add_argument("--only", help="only rows whose name contains this; prints, and writes nothing")
    parser.add_argument("--missing", action="store_true", help="only rows that benchmarks/detection.json lacks")
    args = parser.parse_args()
    stored = json.loads(FILE.read_text())["runs"] if args.missing else []
    there = {r["row"] for r in stored}
    chosen = [i for i, row in enumerate(ROWS) if args.half in (None, row.half) and (args.only or "") in row.name]
    chosen = [i for i in chosen if ROWS[i].name not in there]
    jobs = [(i, seed) for i in chosen for seed in SEEDS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), context) as pool:
        futures = [pool.submit(watched, *job) for job in jobs]
        results = [future.result() for future in tqdm(futures, unit="run", desc="detection")]
    for i in chosen:
        mine = [r for r in results if r["row"] == ROWS[i].name]
        firsts = ", ".join(
            "-" if r["first"] is None else f"{r['first'][0]} ({r['first'][1]}, step {r['first'][2]})" for r in mine
        )
        marks = "".join(".X"[not is_right(r)] for r in mine)
        print(f"{ROWS[i].half[:5]} {ROWS[i].sickness or 'healthy':22} {ROWS[i].name:52} {marks}  {firsts}")
    order = [row.name for row in ROWS]
    results = sorted(
        (r for r in stored + results if r["row"] in order), key=lambda r: (order.index(r["row"]), r["seed"])
    )
    halves = {half: summary(results, half) for half in ("calibration", "judged")}
    print(json.dumps(halves, indent=2))
    if args.only is None and args.half is None:
        origin = {"torch": torch.__version__, "python": platform.python_version(), "steps": STEPS}
        lines = ",\n".join(json.dumps(r) for r in results)
        text = f'{{"provenance": {json.dumps(origin)}, "summary": {json.dumps(halves)}, "runs": [\n{lines}\n]}}\n'
        FILE.write_text(text)


if __name__ == "__main__":
    main()
