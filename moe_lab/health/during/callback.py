"""The watch for transformers' Trainer: `Trainer(..., callbacks=[HealthCallback()])`."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .listener import Hook
from .watch import Watch

NEEDS = "HealthCallback needs transformers 4.46 or later: pip install 'transformers>=4.46' accelerate"


class HealthCallback:
    """A `transformers.TrainerCallback` that watches the run: its `findings` grow while it trains.

    It looks at gradients, weights and steps, not at what the Trainer logs. The loss is the one that is differentiated: what
    the model returned in each pass, times the weight with which the backward pass enters there, summed over an update. A
    Trainer that computes its loss outside of the model is judged by its log, if it logs every step. The options are a
    Watch's; `budget` and `start_step` come from the Trainer. Each call of `train()` has a watch of its own, the last of which
    is `watch`. A model or an optimizer that cannot be watched raises ValueError when the training begins, in one line.
    Raises ImportError, one line, without transformers or with one that is too old.
    """

    def __new__(cls, *args: Any, **options: Any) -> "HealthCallback":
        return super().__new__(trainer_callback(cls))

    def __init__(self, **options: Any):
        self.options, self.watch, self.findings = options, None, []
        self.parts: list[Tensor] = []  # of the loss, of the passes since the last update
        self.scaler: Any = None
        self.is_heard = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **others: Any
    ) -> None:
        self.scaler, self.parts, self.is_heard = getattr(optimizer, "scaler", None), [], False
        start = {"budget": state.max_steps, "start_step": state.global_step}
        self.watch = Watch(model, optimizer, **start | self.options)
        self.findings = self.watch.findings
        failed = partial(self.watch.fail, where="the loss", what="the loss that the model returns is not seen")
        self.handle = model.register_forward_hook(Hook(self.hear, failed))

    def hear(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Keep the loss that a training pass returns as soon as its gradient arrives, times that gradient."""
        loss = output.get("loss") if isinstance(output, dict) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.requires_grad and not loss.ndim:
            self.watch.state.outside.reached.observe(loss)
            value = loss.detach().clone()
            loss.register_hook(lambda weight: self.parts.append(value * weight))

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.parts:
            scale = self.scaler.scale(torch.ones_like(self.parts[0])) if self.scaler else 1.0
            self.watch.observe(loss=torch.stack(self.parts).sum() / scale)
            self.parts, self.is_heard = [], True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        if self.watch and not self.is_heard and state.logging_steps == 1 and "loss" in (logs or {}):
            self.watch.observe(loss=logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.handle.remove()
        self.watch.check()
        self.watch.close()


@cache
def trainer_callback(kind: type) -> type:
    """`kind` as a subclass of transformers' own class, which is imported when the first one is made."""
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError(NEEDS) from error
    if not hasattr(TrainerCallback, "on_pre_optimizer_step"):
        raise ImportError(NEEDS)
    return kind if issubclass(kind, TrainerCallback) else type(kind.__name__, (kind, TrainerCallback), {})
