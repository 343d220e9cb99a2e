"""Windows of a token stream: shuffled and resumable for training, each target once for validation."""

# Shapes: B windows in a batch, T seq_len; a window holds T + 1 tokens, that is T inputs and T targets.

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from moe_lab.config import ConfigError


class Batches:
    """An endless, seeded stream of batches; where it stands fits into four numbers.

    Window i covers `tokens[i * T : i * T + T + 1]`, so that each token but the first is a target once. An epoch is a
    permutation of all whole windows and follows from (seed, epoch) alone; the tokens after the last whole window are
    not used. A batch may span two epochs, so that no window is dropped or repeated.
    Raises ConfigError if `tokens` (1-D, whole numbers) hold not even one window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int):
        self.tokens, self.seq_len, self.batch_size, self.seed = tokens, seq_len, batch_size, seed
        self.n_windows = (len(tokens) - 1) // seq_len
        if self.n_windows < 1:
            raise ConfigError(
                f"data.source gives {len(tokens):,} training tokens, fewer than one window of model.max_seq_len + 1 = "
                f"{seq_len + 1:,}; give more text or lower model.max_seq_len"
            )
        self.epoch = self.position = 0  # position: windows of this epoch that are handed out
        self.order = self.permutation()

    def permutation(self) -> np.ndarray:
        """Order of the windows in the current epoch, (n_windows,) int64."""
        # A hash, since torch's CPU generator uses only the low 32 bits of a seed: seed and epoch side by side in 64
        # bits would give every seed the same order.
        digest = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.randperm(self.n_windows, generator=generator).numpy()

    def next_batch(self) -> torch.Tensor:
        """The next windows, (B, T + 1) int64 on the CPU."""
        return read_windows(self.tokens, [self.next_window() for _ in range(self.batch_size)], self.seq_len)

    def next_window(self) -> int:
        if self.position == self.n_windows:
            self.epoch, self.position = self.epoch + 1, 0
            self.order = self.permutation()
        self.position += 1
        return int(self.order[self.position - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "seed": self.seed, "n_windows": self.n_windows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises ConfigError if it belongs to other data or another seed."""
        for name, cause in (("n_windows", "the data or model.max_seq_len"), ("seed", "training.seed")):
            if state[name] != getattr(self, name):
                raise ConfigError(
                    f"the stored data state has {name}={state[name]}, this run {getattr(self, name)}: {cause} changed; "
                    "restore it or start a new run"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self.permutation()


def validation_windows(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Every token but the first as a target exactly once: batches (at most B, T + 1) int64.

    The last window, if shorter, comes alone. The targets `window[:, 1:]` of all batches are `len(tokens) - 1`.
    """
    n_windows = max(0, (len(tokens) - 1) // seq_len)
    for first in range(0, n_windows, batch_size):
        yield read_windows(tokens, range(first, min(first + batch_size, n_windows)), seq_len)
    rest = tokens[n_windows * seq_len :]
    if len(rest) > 1:
        yield torch.from_numpy(rest.astype(np.int64))[None]


def read_windows(tokens: np.ndarray, indices, seq_len: int) -> torch.Tensor:
    windows = [tokens[i * seq_len : i * seq_len + seq_len + 1] for i in indices]
    return torch.from_numpy(np.stack(windows).astype(np.int64))
