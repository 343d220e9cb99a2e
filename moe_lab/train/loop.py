"""The trainer: one step is one optimizer update. Read `steps` first."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.config import Config
from moe_lab.data import Batches, loss_floors, prepare
from moe_lab.model import LanguageModel, build_model
from moe_lab.optim import build_optimizers, groups_of, lr_share
from moe_lab.train import checkpoint as ckpt
from moe_lab.train import device, directory
from moe_lab.train.controls import CONTROLS, Controls, signals_ask_to_stop
from moe_lab.train.evaluate import evaluate
from moe_lab.train.readings import Readings, Report
from moe_lab.train.record import RECORD, append_jsonl


class Trainer:
    """Trains one model in one run directory (its files: README, "How to read a run").

    `config` is resolved here: device, precision, the vocabulary that the text yields. A given `model` is moved to the
    run's device, unless its `optimizers` are given too: then it must be there already. `listeners` are called, on fit's
    thread, with each finished record row. With `resume` the run stands at the directory's last checkpoint from here on.
    Nothing is written to `run_dir` before `fit`, `steps` or `opened`. Raises ConfigError for the config, the text or
    the model, RunError for the directory: one that holds a record needs `resume=True`.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path,
        resume: bool = False,
        model: LanguageModel | None = None,
        optimizers: list[Optimizer] | None = None,
        listeners: Iterable[Callable[[dict], None]] = (),
    ):
        self.run_dir, self.begun = Path(run_dir), False
        self.lock = FileLock(self.run_dir / ".lock", thread_local=False)  # `opened` on one thread, `fit` on another
        self.record_time = directory.last_written(self.run_dir) if resume else None
        directory.refuse_used(self)
        stored, config = directory.to_resume(*self.latest_checkpoint(), config) if resume else (None, config)
        self.device = device.pick_device(config.training.device)
        if self.device.type == "cpu":
            device.keep_freed_memory()
        self.dataset = prepare(config.data, config.model)
        self.floors = loss_floors(self.dataset)
        model_config = replace(config.model, vocab_size=self.dataset.vocab_size)
        precision = replace(config.precision, compute=device.pick_compute(config, self.device))
        self.config = replace(config, model=model_config, precision=precision)
        self.n_steps, training = self.config.n_steps, config.training
        if model is None:
            model = build_model(model_config, training.seed, self.device)
        self.model = device.place(model, optimizers, precision, self.device)
        self.model.recompute_blocks = training.activation_checkpointing
        self.compiled = torch.compile(self.model.report) if training.compile else None
        self.products = device.bfloat16_products(self.model, precision.compute, self.device)
        self.optimizers = optimizers or build_optimizers(self.model, config.optimizer, training.max_lr)
        for index, group in enumerate(groups_of(self.optimizers)):  # a caller's own optimizers lack these
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("name", f"group_{index}")
        self.batches = Batches(self.dataset.train, model_config.max_seq_len, training.batch_size, training.seed)
        self.listeners = list(listeners)
        self.controls = Controls()
        self.readings = Readings(self.model)
        self.controls.acts["save"] = lambda: self.save(ckpt.step_path(self.run_dir, self.step))
        self.initial_sample: dict | None = None  # of the parameters before the first update
        self.rng_state: dict | None = None  # to go on with; None: seeded
        self.dropout_noise: torch.Generator | None = None  # made when the run begins; no other draw disturbs it
        self.step, self.evaluated = 0, -1  # updates done; the step of the last evaluation
        self.started, self.fetched_at = time.perf_counter(), 0.0  # when `seconds()` was 0; its value at the last fetch
        if stored is not None:
            self.restore(stored)

    def fit(self) -> dict[str, Any]:
        """Train to the end, to `stop()` or to Ctrl-C. Returns the summary, which is also in summary.json. The first
        Ctrl-C finishes the update, saves checkpoint_interrupted.pt and returns; a second one ends it at once. Raises
        RunError for a directory in use, a full disk, too little memory, and a gradient that is not finite."""
        with self.opened(), signals_ask_to_stop(self.controls):
            status = "interrupted"
            try:
                self.evaluate_if_due()
                with contextlib.closing(self.steps()) as steps:
                    for _ in steps:
                        self.evaluate_if_due()
                        if self.step % self.config.training.save_interval == 0 or self.step == self.n_steps:
                            self.save(ckpt.step_path(self.run_dir, self.step))
                if self.step == self.n_steps == self.evaluated:
                    status = "finished"
                else:
                    self.save(self.run_dir / ckpt.FOLDER / ckpt.INTERRUPTED)
            except Exception as error:
                status = "failed"
                if not device.is_out_of_memory(error):
                    raise
                raise ckpt.RunError(device.out_of_memory_advice(self.config, self.device, self.step)) from error
            finally:
                self.begun = False
                summary = directory.write_summary(self, status)
            return summary

    def steps(self, until: int | None = None) -> Iterator[Report]:
        """The same run, an update at a time: `for report in trainer.steps(until=20): print(report.grad_norm.item())`.

        Begins the run if need be, makes updates, and yields each one's Report, until `until` of them are done (counted
        from the run's first; default and limit: `n_steps`) or a stop is asked for; obeys `controls` before each update.
        A later call goes on where this one ended. The record is written every `log_interval` steps, sooner while
        somebody looks, and however the generator ends. Unlike `fit`, it neither evaluates, saves, locks the directory
        nor writes a summary. Raises ValueError for `until` beyond `n_steps`, RunError as `fit` does.
        """
        last = self.n_steps if until is None else until
        if last > self.n_steps:
            raise ValueError(f"until={last} is beyond the run's {self.n_steps} steps; raise training.steps")
        directory.begin(self)
        self.model.train()
        try:
            while self.step < last and not self.obey_controls():
                report = self.update()
                if self.step % self.config.training.log_interval == 0 or self.controls.looks:
                    self.controls.looks = False
                    self.flush()
                yield report
        finally:
            self.flush()

    opened = directory.opened

    def stop(self) -> None:
        """Ask, from any thread, for the end: the update in progress is finished and saved."""
        self.controls.stop()

    def update(self) -> Report:
        """One step: the mean gradient of the micro-batches, clipped, and one move of every optimizer."""
        training = self.config.training
        self.step += 1
        share = lr_share(self.step, self.n_steps, training.warmup_steps, training.min_lr_ratio) * self.controls.lr_scale
        for group in groups_of(self.optimizers):
            group["lr"] = share * group["initial_lr"]
        deviation = self.readings.norm_deviation()
        means: dict[str, Tensor] = {}
        loads: list[list[Tensor]] = []  # of each micro-batch, of each MoE layer
        batches = self.micro_batches()
        n_micro = len(batches)
        for ids in batches:
            if self.device.type == "cuda":
                ids = ids.pin_memory()
            ids = ids.to(self.device, non_blocking=True)
            with self.autocast():
                terms, routings, _ = (self.compiled or self.model.report)(ids, generator=self.dropout_noise)
            with self.products:
                (sum(terms.values()) / n_micro).backward()
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + term.detach() / n_micro
            loads.append([routing.load() for routing in routings])
        grad_norm = self.clip()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        lr = {group["name"]: group["lr"] for group in groups_of(self.optimizers)}
        report = Report(self.step, self.tokens(), lr, means, grad_norm)
        self.readings.add(report, loads, deviation, round(self.seconds(), 3))
        return report

    def micro_batches(self) -> list[Tensor]:
        """Of one step: (B, T + 1) int64 each, on the CPU."""
        return [self.batches.next_batch() for _ in range(self.config.training.gradient_accumulation_steps)]

    def clip(self) -> Tensor:
        """The gradients' norm, before they are clipped."""
        training = self.config.training
        return nn.utils.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)

    def flush(self) -> None:
        """Fetch the waiting readings, append them to the record and tell the listeners. Raises RunError for a gradient
        that was not finite: to look in its step would stall a GPU. A save flushes first."""
        rows = self.readings.fetch()
        if not rows:
            return
        before, self.fetched_at = self.fetched_at, self.seconds()
        rate = len(rows) * self.config.tokens_per_step / (self.fetched_at - before)
        self.report_rows([row | {"tokens_per_s": round(rate, 1)} for row in rows])
        for row in rows:
            if not math.isfinite(row["grad_norm"]):
                lost = f"step {row['step']}: the gradient norm is {row['grad_norm']}, the weights are lost"
                raise ckpt.RunError(f"{lost}; lower training.max_lr, or resume from the last checkpoint")

    def report_rows(self, rows: list[dict]) -> None:
        append_jsonl(self.run_dir / RECORD, rows)
        for row in rows:
            for listener in self.listeners:
                listener(row)

    def evaluate_if_due(self) -> None:
        """At step 0, every eval_interval steps and at the end, once; given up if a stop is asked for meanwhile."""
        training = self.config.training
        due = self.step % training.eval_interval == 0 or self.step == self.n_steps
        if not due or self.step == self.evaluated:
            return
        self.flush()
        result = evaluate(self.model, self.dataset.validation, training.batch_size, self.autocast, self.controls)
        if result is not None:
            row = {"event": "eval", "step": self.step, "tokens": self.tokens(), **result}
            self.report_rows([row | {"seconds": round(self.seconds(), 3)}])
            self.evaluated = self.step
        self.fetched_at = self.seconds()

    def obey_controls(self) -> bool:
        """Do what was asked for since the last update; wait while paused. Returns whether to stop."""
        while True:
            if actions := self.controls.take(self.step):
                append_jsonl(self.run_dir / CONTROLS, actions)
            for act in (self.controls.acts.get(row["action"]) for row in actions):
                if act is not None:
                    act()
            if (stop := self.controls.decision()) is not None:
                return stop
            self.flush()  # who pauses looks at what there is
            with self.off_the_clock():
                self.controls.wait_while_paused(0.1)

    def save(self, path: Path) -> None:
        self.flush()  # the record must reach as far as the checkpoint, and the gradients must have been finite
        with self.off_the_clock():
            ckpt.check_disk(self)
            ckpt.save_atomically(ckpt.snapshot(self), path)
            ckpt.prune(self.run_dir, self.config.training.keep_checkpoints)
        self.controls.saved = path.name

    def latest_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        return ckpt.latest_checkpoint(self.run_dir)

    def restore(self, stored: dict[str, Any]) -> None:
        ckpt.restore(self, stored)

    def tokens(self) -> int:
        return self.step * self.config.tokens_per_step

    def seconds(self) -> float:
        """Training time of the run so far: updates and evaluations, without pauses and saves."""
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What is done within counts neither as training time nor in tokens_per_s."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began

    @contextlib.contextmanager
    def autocast(self):
        """The context of a forward pass; a backward pass wants `products` alone."""
        enabled = self.config.precision.compute == "bfloat16"
        with self.products, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled):
            yield
