"""Makes the twelve runs of a ward, and all that can be ordered of them: `make ward`, `make ward SEED=1`.

Which faults a ward has, and which run has which, follows from the seed (notebooks/checks/ward.py). Every run is a real
training at a small size, watched, saved and then measured by benchmarks/ward_measures.py, which does not know what was
planted. Seeds 0 and 1 are committed under notebooks/results/ward/, others go to runs/ward/SEED; seed 0 brings the labelled
example of notebook 10. A few minutes on two cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from checks import ward as desk
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks.ward_measures import EVERY, MEASURES, Trained
from moe_lab import Trainer, load_config
from moe_lab.config import ROOT, Config, to_yaml
from moe_lab.failures import bugs
from moe_lab.failures.experiments import in_processes
from moe_lab.failures.results import provenance
from moe_lab.health import Watch
from moe_lab.model.attention import Attention
from moe_lab.model.mamba import Mamba
from moe_lab.model.moe import Router, Routing
from moe_lab.optim import build_optimizers
from moe_lab.train import read_record
from moe_lab.train.record import write_atomically

TRAINING = {"steps": 240, "gradient_accumulation_steps": 1, "max_lr": 0.02, "warmup_steps": 20, "min_lr_ratio": 1.0}
TRAINING |= {"log_interval": 20, "eval_interval": 80, "save_interval": 240, "device": "cpu"}
BASE = load_config(ROOT / "configs" / "smoke.yaml").with_(training=TRAINING, model={"dropout": 0.0, "n_experts": 8})


class Plant(NamedTuple):
    """How a variant is planted. Each part is left out where it is not needed."""

    bugs: tuple[str, ...] = ()  # of moe_lab/failures/bugs.yaml
    config: dict[str, dict[str, Any]] = {}  # changes of the config that its author would see
    comments: dict[str, str] = {}  # beside a key of the file
    model: Callable[[nn.Module], object] | None = None  # before the optimizers are made
    optimizers: Callable[[nn.Module, Config], list[Optimizer]] | None = None
    trainer: Callable[[Trainer], object] | None = None  # after


# ---- the code of a fault: small subclasses that take the place of a healthy class ------------------------------------


class AheadByOne(Mamba):
    """The convolution's padding is cut off at the wrong end: each place sees the token after it."""

    def convolve(self, u: Tensor) -> Tensor:
        return super().convolve(F.pad(u[:, 1:], (0, 0, 0, 1)))


class NoMask(Attention):
    """`is_causal` was lost in a rewrite."""

    def forward(self, x: Tensor, positions: Tensor, keep: Tensor | None = None) -> tuple[Tensor, None]:
        y = F.scaled_dot_product_attention(*self.project(x, positions), enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


class SkippedInEvaluation(Mamba):
    """An `if self.training` that was meant for something else: in evaluation the mixer gives nothing."""

    def forward(self, x: Tensor, positions: Tensor | None = None, keep: Tensor | None = None) -> tuple[Tensor, None]:
        return super().forward(x, positions, keep) if self.training else (torch.zeros_like(x), None)


class WrongSign(Router):
    """Balancing by a bias on the choice (Wang et al. 2024, https://arxiv.org/abs/2408.15664) with its sign turned round: who has much gets
    more."""

    def forward(self, tokens: Tensor) -> Routing:
        logits = self.mlp(tokens)
        expert_ids = (logits + self.bias).topk(self.top_k, dim=-1).indices
        routing = Routing(logits.gather(1, expert_ids).softmax(dim=-1), expert_ids, logits)
        if self.training and len(tokens):
            with torch.no_grad():
                self.bias += 0.02 * (routing.load() - 1 / len(self.bias)).sign()
        return routing


def turn_into(kind: type, model: nn.Module) -> None:
    """Every module of the class that `kind` is made from becomes a `kind`."""
    for module in [module for module in model.modules() if type(module) is kind.__mro__[1]]:
        module.__class__ = kind
        if kind is WrongSign:
            bias = torch.zeros(module.mlp.gate.out_features)
            module.register_buffer("bias", bias, persistent=False)


def halved(model: nn.Module) -> None:
    """B12: the loss is divided by an accumulation of 2 once too often."""
    report = model.report

    def half(*args: Any, **options: Any):
        losses = report(*args, **options)
        return losses._replace(terms={name: term / 2 for name, term in losses.terms.items()})

    model.report = half


def random_data(trainer: Trainer) -> None:
    """B08 and B26: the text cannot be read, and random tokens take its place, in training and in validation."""
    generator, old = np.random.default_rng(trainer.config.training.seed), trainer.dataset
    texts = {part: generator.integers(0, old.vocab_size, len(getattr(old, part)), dtype=np.uint16) for part in PARTS}
    trainer.dataset = old._replace(**texts)
    trainer.batches = type(trainer.batches)(
        texts["train"], trainer.config.model.max_seq_len, trainer.batches.batch_size, trainer.batches.seed
    )


PARTS = ("train", "validation")


def padded(trainer: Trainer, share: float) -> None:
    """B11: texts are filled up to the window with token 0, and the filling counts in the loss."""
    batches, plain = trainer.batches, trainer.batches.next_batch
    generator = torch.Generator().manual_seed(batches.seed % 2**31)

    def next_batch() -> Tensor:
        ids = plain()
        length = ids.shape[1]
        kept = (length * (1 - share) * (0.5 + torch.rand(len(ids), 1, generator=generator))).long()
        return ids.masked_fill(torch.arange(length) >= kept, 0)

    batches.next_batch = next_batch


def without(name: str, model: nn.Module, config: Config) -> list[Optimizer]:
    return bugs.forget_group(build_optimizers(model, config.optimizer, config.training.max_lr), name)


def cut(path: str) -> Plant:
    return Plant(model=partial(bugs.detach_output, path=path))


def swap(kind: type, **more: Any) -> Plant:
    return Plant(model=partial(turn_into, kind), **more)


def edit(*bugs: str, **config: dict[str, Any]) -> Plant:
    return Plant(bugs, config)


LOW = {"training": {"max_lr": 3e-4}, "optimizer": {"adamw_lr_ratio": 0.3, "embedding_lr_ratio": None}}
PLANTS: dict[tuple[str, str], Plant] = {
    ("healthy", "as configured"): Plant(),
    ("healthy", "long warm-up"): Plant(config={"training": {"warmup_steps": 120}}),
    ("healthy", "AdamW alone"): Plant(config={"training": {"max_lr": 5e-3}, "optimizer": {"type": "adamw", "embedding_lr_ratio": None}}),
    ("healthy", "the other convention"): Plant(
        config={"training": {"max_lr": 0.01}, "optimizer": {"adjust_lr": "match_rms_adamw", "adamw_lr_ratio": 0.16, "embedding_lr_ratio": 0.6}}
    ),
    ("random tokens", "uniform"): Plant(trainer=random_data),
    ("padding in the loss", "half"): Plant(trainer=partial(padded, share=0.5)),
    ("padding in the loss", "most"): Plant(trainer=partial(padded, share=0.65)),
    ("sees the future", "convolution"): swap(AheadByOne),
    ("sees the future", "attention"): swap(NoMask),
    ("sees the future", "unsorted"): edit("B04"),
    ("training and evaluation differ", "depth off"): edit("B06"),
    ("training and evaluation differ", "mixer off"): swap(SkippedInEvaluation),
    ("updates rounded away", "by the code"): Plant(model=bugs.cast_parameters),
    ("updates rounded away", "by the config"): Plant(config={"precision": {"parameters": "bfloat16"}}),
    ("learning rate too low", "of AdamW"): Plant(config=LOW, comments={"max_lr": "Lower for AdamW (use 0.001 for Muon)"}),
    ("learning rate too low", "a tenth"): Plant(config={"training": {"max_lr": 0.001}}),
    ("learning rate too high", "20 ×"): Plant(config={"training": {"max_lr": 0.4}}),
    ("cut off from the gradient", "feed-forward"): cut("layers.1.ffn"),
    ("cut off from the gradient", "values"): cut("layers.2.seq_layer.v_proj"),
    ("cut off from the gradient", "depth router"): edit("B05"),
    ("in no optimizer", "vectors"): Plant(optimizers=partial(without, "adamw")),
    ("in no optimizer", "matrices"): Plant(optimizers=partial(without, "muon")),
    ("in no optimizer", "embeddings and heads"): Plant(optimizers=partial(without, "adamw_decayed")),
    ("experts collapsed", "wrong sign"): swap(
        WrongSign, config={"model": {"moe_balance_weight": 0.0}}, comments={"moe_balance_weight": "balanced by a bias instead"}
    ),
    ("shown loss off by a factor", "halved"): Plant(model=halved),
    ("batches that repeat", "four"): edit("the same batches"),
    ("labels shifted twice", "again"): edit("shifted twice"),
    ("residual added twice", "skipped"): edit("B03"),
    ("positions are ranks", "anew"): edit("B17"),
    ("a block without memory", "stand-in"): edit("B09"),
    ("special start values overwritten", "zeros"): edit("B19"),
    ("gradients cleared too early", "early"): edit("cleared before the step"),
    ("gradients clipped too hard", "clip"): edit("clipped at a thousandth"),
    ("learning rate spent early", "third"): edit("spent early"),
    ("warm-up off by one", "first"): edit("B18"),
    ("a schedule that does not fit", "log"): edit(training={"log_interval": 400}),
}  # fmt: skip


# ---- a run -----------------------------------------------------------------------------------------------------------


def commented(config: Config, comments: dict[str, str]) -> str:
    """The file as its author left it."""
    lines = to_yaml(config).splitlines()
    for key, comment in comments.items():
        lines = [f"{line}  # {comment}" if line.strip().startswith(f"{key}:") else line for line in lines]
    return "\n".join(lines) + "\n"


def made(plan: desk.Plan, folder: Path) -> tuple[Trainer, Watch, Path]:
    """The trainer of a plan, its watch and its config file."""
    plants = [PLANTS[fault] for fault in plan.faults]
    config, comments = BASE.with_(training={"seed": plan.seed}), {}
    for plant in plants:
        config, comments = config.with_(**plant.config), comments | plant.comments
    path = folder / "config.yaml"
    path.write_text(commented(config, comments), encoding="utf-8")
    model = Trainer(config, folder / "start").model
    for plant in plants:
        if plant.model:
            plant.model(model)
    make = next((plant.optimizers for plant in plants if plant.optimizers), None)
    trainer = Trainer(config, folder / "run", model=model, optimizers=make and make(model, config))
    for plant in plants:
        if plant.trainer:
            plant.trainer(trainer)
    watch = Watch(trainer.model, trainer.optimizers, budget=trainer.n_steps, quiet=True)
    trainer.listeners.append(lambda row: watch.observe(loss=row["loss"]) if "loss" in row else None)
    return trainer, watch, path


def run(plan: desk.Plan) -> dict[str, Any]:
    """Train a plan and measure it: what its file holds. No word of what was planted."""
    torch.set_num_threads(1)
    planted = bugs.planted(*(bug for fault in plan.faults for bug in PLANTS[fault].bugs))
    with planted, tempfile.TemporaryDirectory() as folder:
        trainer, watch, path = made(plan, Path(folder))
        trainer.fit()
        with contextlib.redirect_stdout(io.StringIO()) as table:
            watch.report()
        watch.close()
        rows = read_record(trainer.run_dir)
        trained = Trained(trainer, rows, trainer.floors, path, watch.findings, table.getvalue())
        measured = {name: measure(trained) for name, measure in MEASURES.items()}
        steps = [row for row in rows if "loss" in row]
        record = {key: [float(f"{row[key]:.5g}") for row in steps[::EVERY]] for key in ("step", "loss", "grad_norm")}
        return {
            "config": path.read_text(encoding="utf-8"),
            "origin": provenance() | {"corpus": trainer.dataset.corpus_hash[:12]},
            "record": record,
            "measured": measured,
        }


def run_to(path: Path, plan: desk.Plan) -> None:
    """Run a plan, and write one key a line: a file that can be compared, and is small."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in run(plan).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    seed = int(os.environ.get("SEED") or 0)
    plans, folder = desk.draw(seed), desk.folder_of(seed)
    paths = {folder / desk.file_of(name): plan for name, plan in plans.items()}
    if seed == 0:
        paths |= {desk.COMMITTED / desk.file_of(name): plan for name, plan in desk.EXAMPLE.items()}
    done = in_processes(run_to, paths.items(), int(os.environ.get("WORKERS") or 0))
    for _ in tqdm(done, unit="run", desc=f"ward {seed}", total=len(paths)):
        pass
    print(f"{len(plans)} runs in {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
