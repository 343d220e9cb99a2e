"""A stand-in for the trainer: the same surface, made-up readings, no model. For tests of what watches a run."""

import math
import threading
import time
from types import SimpleNamespace

from moe_lab.train.controls import Controls


def step_row(step):
    loss = 4.2 + 4.1 * math.exp(-step / 60) + 0.05 * math.sin(7 * step)
    return {
        "step": step,
        "tokens": 2048 * step,
        "loss": loss + 0.1,
        "losses": {"next_token": loss, "moe_balance": 0.02},
        "grad_norm": 0.5 + 2 * math.exp(-step / 20),
        "norm_deviation": 1e-4 * step,
        "expert_load": [[(1 + 0.5 * math.sin(step + e + layer)) / 8 for e in range(8)] for layer in range(2)],
        "tokens_per_s": 6000.0,
    }


def eval_row(step):
    return {"event": "eval", "step": step, "validation_loss": 4.3 + 4 * math.exp(-step / 60)}


class FakeTrainer:
    """`n_steps` steps of `step_s` seconds; with `fails_at` it raises in that step."""

    floors = {"trigram": 4.08}

    def __init__(self, n_steps=20, step_s=0.002, fails_at=None, run_dir="no_such_run", step=0):
        self.n_steps, self.step_s, self.fails_at, self.run_dir, self.step = n_steps, step_s, fails_at, run_dir, step
        model = SimpleNamespace(aux_loss_weights=(1.0,), moe_layers=(0, 2))
        training = SimpleNamespace(max_grad_norm=1.0, log_interval=1)
        self.config = SimpleNamespace(model=model, training=training, n_steps=n_steps)
        self.controls, self.listeners, self.thread = Controls(), [], None

    def stop(self):
        self.controls.stop()

    def report(self, row):
        for listener in self.listeners:
            listener(row)

    def fit(self):
        self.thread = threading.current_thread()
        self.report(eval_row(self.step))
        while self.step < self.n_steps and not self.controls.stopped:
            time.sleep(self.step_s)
            self.step += not self.controls.paused
            if self.step == self.fails_at:
                raise FloatingPointError(f"loss is nan in step {self.step}")
            self.report(step_row(self.step))
        self.report(eval_row(self.step))
        return {"status": "interrupted" if self.controls.stopped else "finished", "steps": self.step}
