"""Casts that autocast keeps for longer than the weights stay what they were."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import said

from moe_lab.health import Watch

CAST = partial(torch.autocast, "cpu", torch.bfloat16)
WAYS = {  # what is around the loop, around each update, and around each pass; is it told?
    "the loop": (CAST, nullcontext, nullcontext, True),
    "the loop, and each pass": (CAST, nullcontext, CAST, True),
    "the loop, without a cache": (partial(CAST, cache_enabled=False), nullcontext, nullcontext, False),
    "each update": (nullcontext, CAST, nullcontext, False),
    "each pass": (nullcontext, nullcontext, CAST, False),
    "nothing": (nullcontext, nullcontext, nullcontext, False),
}


def trained(way: str, watched: bool = True) -> tuple[list[float], list[str]]:
    loop, update, one_pass, _ = WAYS[way]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    with Watch(model, optimizer, quiet=True) if watched else nullcontext() as watch, loop():
        for _ in range(12):
            with update():
                x = torch.randn(64, 8)
                with one_pass():
                    loss = F.mse_loss(model(x).float(), x[:, :4])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(float(loss.detach()))
            with torch.inference_mode():  # a validation, which keeps nothing
                model(x)
    return losses, said(watch) if watched else []


@pytest.mark.parametrize("way", WAYS)
def test_an_autocast_around_several_updates_computes_with_old_weights(way: str) -> None:
    losses, found = trained(way)
    assert found == ["stuck_copy"] * WAYS[way][-1]
    assert losses == trained(way, watched=False)[0]
