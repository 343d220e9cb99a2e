"""Windows of a token stream: shuffled and resumable for training, each target once for validation."""

# Shapes: B windows in a batch, T seq_len; a window holds T + 1 tokens, that is T inputs and T targets.

import hashlib
from collections.abc import Iterator

import numpy as np
import torch


class Batches:
    """An endless, seeded stream of batches; where it stands fits into two numbers.

    Window i covers `tokens[i * T : i * T + T + 1]`, so that each token but the first is a target once. An epoch is a
    permutation of all whole windows and follows from (seed, epoch) alone. A batch may span two epochs, so that no
    window is dropped or repeated. `tokens` (1-D, whole numbers) hold one window at least.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, batch_size: int, seed: int):
        self.windows, self.batch_size, self.seed = whole_windows(tokens, seq_len), batch_size, seed
        self.go_to(epoch=0, position=0)

    def go_to(self, epoch: int, position: int) -> None:
        """Stand where `position` windows of an epoch are handed out."""
        # a hash, since torch's CPU generator uses only the low 32 bits of a seed
        digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        self.order = torch.randperm(len(self.windows), generator=generator, dtype=torch.int32)  # 4 bytes a window
        self.epoch, self.position = epoch, position

    def next_batch(self) -> torch.Tensor:
        """The next windows, (B, T + 1) int64 on the CPU."""
        return as_batch(self.windows[[self.next_window() for _ in range(self.batch_size)]])

    def next_window(self) -> int:
        if self.position == len(self.order):
            self.go_to(self.epoch + 1, 0)
        self.position += 1
        return int(self.order[self.position - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, of the same tokens, seq_len and seed."""
        self.go_to(state["epoch"], state["position"])


def validation_windows(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Every token but the first as a target exactly once: batches (at most B, T + 1) int64. The last window, if
    shorter, comes alone. The targets `window[:, 1:]` of all batches are `len(tokens) - 1`."""
    whole = whole_windows(tokens, seq_len) if len(tokens) > seq_len else tokens[:0, None]
    for first in range(0, len(whole), batch_size):
        yield as_batch(whole[first : first + batch_size])
    rest = tokens[len(whole) * seq_len :]
    if len(rest) > 1:
        yield as_batch(rest[None])


def whole_windows(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """A view, (n_windows, T + 1): the last token of a window is the first of the next."""
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def as_batch(windows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(windows.astype(np.int64))
