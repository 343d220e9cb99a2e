"""The trainer: one step is one optimizer update. Read `steps` first."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.config import Config, to_dict, to_yaml
from moe_lab.data import Batches, loss_floors, prepare
from moe_lab.model import build_model
from moe_lab.optim import build_optimizers, groups_of, lr_share
from moe_lab.train import checkpoint as ckpt
from moe_lab.train.checkpoint import RunError
from moe_lab.train.controls import CONTROLS, Controls, signals_ask_to_stop
from moe_lab.train.device import bfloat16_products, is_out_of_memory, keep_freed_memory, pick_compute, pick_device
from moe_lab.train.evaluate import evaluate
from moe_lab.train.readings import Readings
from moe_lab.train.record import RECORD, append_jsonl, cut_jsonl, read_jsonl, read_record, write_atomically
from moe_lab.train.resume import merge
from moe_lab.train.summary import commit as commit  # the place where benchmarks look for it
from moe_lab.train.summary import write_summary


class Report(NamedTuple):
    """One update; the tensors are scalars on the run's device, and nothing was fetched for it."""

    step: int  # this update's number, from 1
    tokens: int  # trained on so far, with this update's
    lr: dict[str, float]  # of each group, in this update
    losses: dict[str, Tensor]  # the weighted terms, measured before the update; their sum is the loss
    grad_norm: Tensor  # before clipping


class Trainer:
    """Trains one model in one run directory (its files: README, "How to read a run").

    `config` is resolved here: device, precision, the vocabulary that the text yields. `model` and `optimizers` may be
    given ready-made. `listeners` are called, on fit's thread, with each finished record row. Nothing is written
    before `fit`. Raises ConfigError for the config or the text, RunError for the directory: a directory that holds a
    record needs `resume=True`.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        resume: bool = False,
        model: nn.Module | None = None,
        optimizers: list[Optimizer] | None = None,
        listeners: Iterable[Callable[[dict], None]] = (),
    ):
        self.run_dir = Path(run_dir)
        self.resume = resume
        self.refuse_used_directory()
        self.stored, self.notices = None, []
        if resume:
            path, self.stored, self.notices = ckpt.latest_checkpoint(self.run_dir)
            config, differences = merge(self.stored["config"], config, str(path))
            self.notices += [f"resuming after step {self.stored['step']} of {path}", *differences]
        self.device = pick_device(config.training.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.dataset = prepare(config.data, config.model)
        if self.stored and self.stored["data_state"]["corpus"] != self.dataset.corpus_hash:
            raise RunError(
                f"{self.run_dir}: the text of data.source={config.data.source} has changed since the checkpoint; "
                "bring it back, or start in a new directory"
            )
        model_config = replace(config.model, vocab_size=self.dataset.vocab_size)
        precision = replace(config.precision, compute=pick_compute(config, self.device))
        self.config = replace(config, model=model_config, precision=precision)
        self.n_steps = self.config.n_steps
        self.model = model if model is not None else build_model(model_config, config.training.seed, self.device)
        if precision.parameters == "bfloat16":
            self.model.to(torch.bfloat16)
        self.model.recompute_blocks = config.training.activation_checkpointing
        self.optimizers = optimizers or build_optimizers(self.model, config.optimizer, config.training.max_lr)
        for index, group in enumerate(groups_of(self.optimizers)):  # a caller's own optimizers lack these
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("name", f"group_{index}")
        self.batches = Batches(
            self.dataset.train, model_config.max_seq_len, config.training.batch_size, config.training.seed
        )
        self.listeners = list(listeners)
        self.controls = Controls()
        self.step = 0
        self.begun = False  # whether the run's directory holds what a run begins with
        self.seconds_before = 0.0  # wall time of the run before this process

    # ---- what a caller uses ------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end, to `stop()` or to Ctrl-C. Returns the summary, which is also in summary.json.

        The first Ctrl-C finishes the update, saves checkpoint_interrupted.pt and returns; a second one raises
        KeyboardInterrupt at once. Raises RunError for what can go wrong on the way: a directory in use, a full disk,
        too little memory, a gradient that is not finite.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.run_dir}: cannot be a run directory: {error.strerror}; take another one") from None
        lock = FileLock(self.run_dir / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"{self.run_dir}: another process trains here; wait for it or take another directory"
            ) from None
        try:
            self.refuse_used_directory()  # again: another process may have come and gone
            if self.stored and ckpt.latest_checkpoint(self.run_dir)[1]["step"] != self.stored["step"]:
                raise RunError(f"{self.run_dir}: another process has gone on with this run meanwhile; start again")
            with signals_ask_to_stop(self.controls):
                return self.run()
        finally:
            lock.release()

    def steps(self, until: int | None = None) -> Iterator[Report]:
        """The same run, an update at a time: the one way to drive a training by hand.

            for report in trainer.steps(until=20):
                print(report.step, report.grad_norm.item())

        Begins the run if it has not begun: the directory with config.yaml, tokenizer.json and an empty record, or the
        checkpoint's state. Then makes updates, and yields each one's Report, until `until` of them are done (counted
        from the run's first; default and limit: `n_steps`) or a stop is asked for. A later call goes on where this one
        ended. What is asked of `controls` is done before each update. The record is written every `log_interval` steps
        and when the generator ends, is closed, or fails. It neither evaluates nor saves by itself, does not lock the
        directory and writes no summary: `fit` does, and makes the same updates. Between two updates the caller may do
        what he likes; an exception there leaves a whole run, and so does not going on.
        Raises ValueError for `until` beyond `n_steps`, RunError as `fit` does.
        """
        last = self.n_steps if until is None else until
        if last > self.n_steps:
            raise ValueError(f"until={last} is beyond the run's {self.n_steps} steps; raise training.steps")
        self.start()
        self.model.train()
        try:
            while self.step < last and not self.obey_controls():
                report = self.update()
                if self.step % self.config.training.log_interval == 0:
                    self.flush()
                yield report
        finally:
            self.flush()

    def stop(self) -> None:
        """Ask, from any thread, for the end: the update in progress is finished and saved."""
        self.controls.stop()

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        self.start()
        status = "failed"
        try:
            self.evaluate_if_due()
            with contextlib.closing(self.steps()) as steps:
                for _ in steps:
                    self.evaluate_if_due()
                    if self.step % self.config.training.save_interval == 0 or self.step == self.n_steps:
                        self.save(ckpt.step_path(self.run_dir, self.step))
            finished = self.step == self.n_steps and self.step in self.evaluated
            if not finished:
                self.save(self.run_dir / ckpt.FOLDER / ckpt.INTERRUPTED)
            status = "finished" if finished else "interrupted"
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise RunError(self.out_of_memory_advice()) from error
            raise
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self.readings.loads.close()
            self.begun = False
            summary = write_summary(self, status)
        return summary

    def start(self) -> None:
        """Write what a run begins with, or restore what it was stopped with. Does nothing when the run has begun."""
        if self.begun:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / ckpt.FOLDER).mkdir(exist_ok=True)
        for unfinished in (self.run_dir / ckpt.FOLDER).glob("*.part"):
            unfinished.unlink()  # a save that a kill cut short
        size = ckpt.checkpoint_bytes(self.model, self.optimizers)
        ckpt.check_disk(self.run_dir, size * (self.config.training.keep_checkpoints + 1))
        self.floors = loss_floors(self.dataset)
        self.initial_sample = ckpt.initial_sample(self.model)
        torch.manual_seed(self.config.training.seed)  # for dropout, whatever this process drew before
        if self.stored is not None:
            self.restore(self.stored)
            self.stored = None
        if self.step > self.n_steps:
            raise RunError(
                f"{self.run_dir}: {self.step} steps are done and training.steps={self.n_steps}; ask for more"
            )
        cut_jsonl(self.run_dir / RECORD, self.step)
        cut_jsonl(self.run_dir / CONTROLS, self.step)
        for row in read_jsonl(self.run_dir / CONTROLS):  # what was asked right after the checkpoint was written
            if row["action"] == "lr_scale":
                self.controls.lr_scale = row["value"]
        rows = read_record(self.run_dir)
        self.evaluated = {row["step"] for row in rows if row.get("event") == "eval"}
        self.seconds_before = max((row["seconds"] for row in rows), default=0.0)
        self.readings = Readings(self.model)
        self.started = self.fetched = time.perf_counter()
        for notice in self.notices:
            print(notice, file=sys.stderr)
        write_atomically(self.run_dir / "config.yaml", to_yaml(self.config))
        write_atomically(self.run_dir / "tokenizer.json", self.dataset.tokenizer.to_str())
        (self.run_dir / RECORD).touch()
        self.begun = True

    def update(self) -> Report:
        """One step: the mean gradient of the micro-batches, clipped, and one move of every optimizer."""
        training = self.config.training
        self.step += 1
        share = lr_share(self.step, self.n_steps, training.warmup_steps, training.min_lr_ratio) * self.controls.lr_scale
        for group in groups_of(self.optimizers):
            group["lr"] = share * group["initial_lr"]
        deviation = self.readings.norm_deviation()
        means: dict[str, Tensor] = {}
        n_micro = training.gradient_accumulation_steps
        for _ in range(n_micro):
            ids = self.batches.next_batch()
            if self.device.type == "cuda":
                ids = ids.pin_memory()
            with self.autocast():
                terms = self.model.losses(ids.to(self.device, non_blocking=True))
            with self.products():
                (sum(terms.values()) / n_micro).backward()
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + term.detach() / n_micro
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        lr = {group["name"]: group["lr"] for group in groups_of(self.optimizers)}
        report = Report(self.step, self.tokens(), lr, means, grad_norm)
        self.readings.add(report, deviation, round(self.seconds(), 3))
        return report

    def flush(self) -> None:
        """Fetch the waiting readings, append them to the record and tell the listeners.

        Raises RunError for a gradient that was not finite. It is noticed here and not in its step, since looking
        would stall a GPU; nothing is saved in between, so the last checkpoint is sound.
        """
        rows = self.readings.fetch()
        if not rows:
            return
        now = time.perf_counter()
        rate = len(rows) * self.config.tokens_per_step / (now - self.fetched)
        self.fetched = now
        for row in rows:
            row["tokens_per_s"] = round(rate, 1)
        self.tell(rows)
        for row in rows:
            if not math.isfinite(row["grad_norm"]):
                raise RunError(
                    f"step {row['step']}: the gradient norm is {row['grad_norm']}, the weights are lost; "
                    "lower training.max_lr, or resume from the last checkpoint"
                )

    def tell(self, rows: list[dict]) -> None:
        append_jsonl(self.run_dir / RECORD, rows)
        for row in rows:
            for listener in self.listeners:
                listener(row)

    def evaluate_if_due(self) -> None:
        """At step 0, every eval_interval steps and at the end, once; given up if a stop is asked for meanwhile."""
        due = self.step % self.config.training.eval_interval == 0 or self.step == self.n_steps
        if not due or self.step in self.evaluated:
            return
        self.flush()
        seq_len, batch_size = self.config.model.max_seq_len, self.config.training.batch_size
        stopped = lambda: self.controls.stopped  # noqa: E731
        result = evaluate(self.model, self.dataset.validation, seq_len, batch_size, self.autocast, stopped)
        if result is not None:
            row = {"event": "eval", "step": self.step, "tokens": self.tokens(), **result}
            self.tell([row | {"seconds": round(self.seconds(), 3)}])
            self.evaluated.add(self.step)
        self.fetched = time.perf_counter()

    def obey_controls(self) -> bool:
        """Do what was asked for since the last update; wait while paused. Returns whether to stop."""
        while True:
            actions = self.controls.take(self.step)
            if actions:
                append_jsonl(self.run_dir / CONTROLS, actions)
            if any(row["action"] == "save" for row in actions):
                self.save(ckpt.step_path(self.run_dir, self.step))
            if self.controls.stopped or not self.controls.wait_while_paused(0.1):
                return self.controls.stopped

    # ---- state -------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        self.flush()  # the record must reach as far as the checkpoint, and the gradients must have been finite
        ckpt.check_disk(path.parent, ckpt.checkpoint_bytes(self.model, self.optimizers))
        state = {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": [optimizer.state_dict() for optimizer in self.optimizers],
            "scheduler_state_dict": {"step": self.step, "max_lr": self.config.training.max_lr}
            | {"n_steps": self.n_steps, "lr_scale": self.controls.lr_scale},
            "step": self.step,
            "tokens_seen": self.tokens(),
            "rng_state": ckpt.rng_state(self.device),
            "data_state": self.batches.state_dict() | {"corpus": self.dataset.corpus_hash},
            "config": to_dict(self.config),
            "initial_sample": self.initial_sample,
        }
        ckpt.save_atomically(state, path)
        ckpt.prune(self.run_dir, self.config.training.keep_checkpoints)

    def restore(self, state: dict[str, Any]) -> None:
        """Everything as it was, except the options of the optimizers' groups: the config given decides those.

        An optimizer's own load_state_dict would bring back the stored LRs and with them a corrected mistake.
        """
        self.model.load_state_dict(state["model_state_dict"])
        for optimizer, stored in zip(self.optimizers, state["optimizer_state_dict"], strict=True):
            options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(stored)
            for group, given in zip(optimizer.param_groups, options, strict=True):
                group.update(given)
        self.step = state["step"]
        self.controls.lr_scale = state["scheduler_state_dict"]["lr_scale"]
        self.batches.load_state_dict(state["data_state"])
        self.initial_sample = state["initial_sample"]
        ckpt.restore_rng(state["rng_state"], self.device)

    # ---- small parts -------------------------------------------------------------------------------------------------

    def tokens(self) -> int:
        return self.step * self.config.tokens_per_step

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @contextlib.contextmanager
    def autocast(self):
        """The context of a forward pass; a backward pass wants `products` alone."""
        enabled = self.config.precision.compute == "bfloat16"
        with self.products(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield

    def products(self):
        return bfloat16_products(self.model, self.config.precision.compute, self.device)

    def refuse_used_directory(self) -> None:
        if not self.resume and (self.run_dir / RECORD).exists():
            raise RunError(
                f"{self.run_dir}: holds a run already; continue it with resume=True, or take another directory"
            )

    def out_of_memory_advice(self) -> str:
        training, model = self.config.training, self.config.model
        return (
            f"out of memory on {self.device} at step {self.step}: lower training.batch_size ({training.batch_size}; raise "
            f"training.gradient_accumulation_steps to keep the step), model.max_seq_len ({model.max_seq_len}) or "
            f"model.d_model ({model.d_model}), or set training.activation_checkpointing"
        )
