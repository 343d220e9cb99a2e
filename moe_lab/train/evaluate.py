"""Validation loss: next-token cross-entropy over every target of the validation split, in evaluation mode."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moe_lab.data import validation_windows
from moe_lab.model import LanguageModel
from moe_lab.model.depth import agreement
from moe_lab.model.heads import targets_of, token_loss
from moe_lab.train.controls import Controls


@torch.no_grad()
def evaluate(
    model: LanguageModel, tokens: np.ndarray, batch_size: int, autocast: Callable, controls: Controls | None = None
) -> dict[str, float | list[float]] | None:
    """`validation_loss` in nats per token and, with MoD, `mod_agreement` of each router; None if a stop is asked of `controls`.

    `autocast` makes the context to compute in; `controls.evaluated` says how far it is. Each module's mode is put back.
    """
    device = model.embedding.weight.device
    total = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    agreed: Tensor | float = 0.0
    n_targets, done = len(tokens) - 1, 0
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for ids in validation_windows(tokens, model.config.max_seq_len, batch_size):
            if controls is not None:
                controls.evaluated = done / n_targets
                if controls.stopped:
                    return None
            ids = ids.to(device)
            with autocast():
                trunk = model.trunk(ids[:, :-1])
                loss = token_loss(model.lm_heads[0], trunk.hidden, targets_of(ids, None, 1))
            count = ids[:, 1:].numel()
            done += count
            total += loss * count
            if trunk.depth:
                agreed = agreed + torch.stack([agreement(report) for report in trunk.depth]) * count
    finally:
        for module, was_training in modes.items():
            module.training = was_training
        if controls is not None:
            controls.evaluated = 1.0
    result: dict[str, float | list[float]] = {"validation_loss": (total / n_targets).item()}
    if isinstance(agreed, Tensor):
        result["mod_agreement"] = [round(share, 6) for share in (agreed / n_targets).tolist()]
    return result
