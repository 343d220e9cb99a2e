"""The learning rate of a step, as a pure function of the step."""

import math


def lr_share(step: int, n_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """The share of the peak LR with which update `step` (1 … n_steps) runs.

    Linear warm-up: update n runs at n / warmup_steps. Then a cosine to `min_ratio` at the last update, and that later.
    Source of the cosine: Loshchilov & Hutter 2017, eq. 5, https://arxiv.org/abs/1608.03983, without restarts.
    """
    if step <= warmup_steps:
        return step / warmup_steps
    if step >= n_steps:
        return min_ratio
    progress = (step - warmup_steps) / (n_steps - warmup_steps)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2
