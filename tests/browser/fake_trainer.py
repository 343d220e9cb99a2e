"""A stand-in for the trainer: the same surface, made-up readings, no model. For tests of what watches a run."""

import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace


class FakeControls:
    def __init__(self):
        self.paused, self.stopped, self.lr_scale, self.lr_scales, self.saves = False, False, 1.0, [], 0

    def stop(self):
        self.stopped = True

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def save(self):
        self.saves += 1

    def set_lr_scale(self, x):
        self.lr_scale = x
        self.lr_scales.append(x)


def step_row(step, lr_scale=1.0, n_experts=8):
    loss = 4.2 + 4.1 * math.exp(-step / 60) + 0.05 * math.sin(7 * step)
    load = [[(1 + 0.5 * math.sin(step + e + layer)) / n_experts for e in range(n_experts)] for layer in range(2)]
    return {
        "step": step,
        "tokens": 2048 * step,
        "loss": loss + 0.1,
        "losses": {"next_token": loss, "moe_balance": 0.02},
        "lr": {"muon": 1e-3 * lr_scale},
        "grad_norm": 0.5 + 2 * math.exp(-step / 20),
        "norm_deviation": 1e-4 * step,
        "expert_load": load,
        "seconds": 0.02,
        "tokens_per_s": 6000.0,
    }


def eval_row(step):
    return {
        "event": "eval",
        "step": step,
        "tokens": 2048 * step,
        "validation_loss": 4.3 + 4 * math.exp(-step / 60),
        "mod_agreement": 0.9,
    }


class FakeTrainer:
    """`n_steps` steps of `step_s` seconds; with `fails_at` it raises in that step."""

    def __init__(self, n_steps=20, step_s=0.002, fails_at=None, run_dir="no_such_run"):
        self.n_steps, self.step_s, self.fails_at = n_steps, step_s, fails_at
        self.run_dir = Path(run_dir)
        model, training = SimpleNamespace(aux_loss_weights=(1.0,)), SimpleNamespace(max_grad_norm=1.0)
        self.config = SimpleNamespace(model=model, training=training, n_steps=n_steps)
        self.controls, self.listeners, self.thread = FakeControls(), [], None

    def stop(self):
        self.controls.stop()

    def report(self, row):
        for listener in self.listeners:
            listener(row)

    def fit(self):
        self.thread = threading.current_thread()
        self.report(eval_row(0))
        step = 0
        while step < self.n_steps and not self.controls.stopped:
            time.sleep(self.step_s)
            if self.controls.paused:
                continue
            step += 1
            if step == self.fails_at:
                raise FloatingPointError(f"loss is nan in step {step}")
            self.report(step_row(step, self.controls.lr_scale))
        self.report(eval_row(step))
        return {"status": "interrupted" if self.controls.stopped else "finished", "steps": step}
