"""Loss floors: what tables of counts reach on the very targets of the model's validation loss."""

import json
import math
import os

import numpy as np

from moe_lab.config import ConfigError
from moe_lab.data.prepare import Dataset

COUNTED = 1 << 24  # tokens; a trigram takes 8 bytes, and sorting them twice that


def loss_floors(dataset: Dataset) -> dict[str, float]:
    """Mean loss in nats per token over all validation tokens but the first: `uniform`, `unigram`, `bigram`, `trigram`.
    Counted in the first COUNTED training tokens, across documents, and kept in `dataset.folder`."""
    path = dataset.folder / "loss_floors.json"
    if path.exists():
        return json.loads(path.read_text())
    floors = {"uniform": math.log(dataset.vocab_size)}
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        floors[name] = witten_bell(dataset.train[:COUNTED], dataset.validation, dataset.vocab_size, order)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(floors))
    draft.replace(path)  # another process may count the same floors; either file is right
    return floors


def witten_bell(train: np.ndarray, targets_stream: np.ndarray, vocab_size: int, order: int) -> float:
    """Mean of -ln p over `targets_stream[1:]`, nats per token; p as in `witten_bell_probabilities`."""
    return float(-np.log(witten_bell_probabilities(train, targets_stream, vocab_size, order)).mean())


def witten_bell_probabilities(train: np.ndarray, targets_stream: np.ndarray, vocab_size: int, order: int) -> np.ndarray:
    """Interpolated Witten-Bell probability of each token of `targets_stream[1:]`, float64, from counts in `train`.

    With h the n - 1 tokens before w, h' all of them but the first, c a count in `train` (h only where a token
    follows it) and N the number of different tokens seen after h:

        p_n(w | h) = (c(h w) + N(h) p_{n-1}(w | h')) / (c(h) + N(h)),    p_{n-1}(w | h') if h was never seen,

    down to p_0 = 1 / vocab_size; `order` is the n of the result: 1 unigram, 2 bigram, 3 trigram. A target with fewer
    than n - 1 tokens before it has an unseen history.
    Raises ConfigError if `order` tokens do not fit into one 64-bit key.
    Source: Witten and Bell 1991, "The zero-frequency problem" (method C), interpolated as in Chen and Goodman 1998, "An
    empirical study of smoothing techniques for language modeling" (TR-10-98), sec. 2.
    """
    bits = (vocab_size - 1).bit_length()
    if bits * order > 63:
        limit = 2 ** (63 // order)
        raise ConfigError(f"model.vocab_size={vocab_size:,} is too large to count {order}-grams; at most {limit:,}")
    p = np.full(len(targets_stream) - 1, 1 / vocab_size)
    for n in range(1, order + 1):
        grams, gram_counts = np.unique(pack(train, n, bits), return_counts=True)
        if len(grams) == 0:  # a training text shorter than n has seen no history of this length, nor of any longer one
            break
        # grams are sorted, so those of one history stand together
        histories, starts, n_types = np.unique(grams >> bits, return_index=True, return_counts=True)
        history_counts = np.add.reduceat(gram_counts, starts)

        wanted = pack(targets_stream, n, bits)[1 if n == 1 else 0 :]
        place, seen = find(wanted >> bits, histories)
        gram_place, gram_seen = find(wanted, grams)
        count = np.where(gram_seen, gram_counts[gram_place], 0)
        lower = p[len(p) - len(wanted) :]
        mixed = (count + n_types[place] * lower) / (history_counts[place] + n_types[place])
        p[len(p) - len(wanted) :] = np.where(seen, mixed, lower)
    return p


def pack(tokens: np.ndarray, n: int, bits: int) -> np.ndarray:
    """One int64 key for each n-gram of `tokens`, (len - n + 1,); the last token sits in the lowest bits."""
    n_keys = max(0, len(tokens) - n + 1)
    keys = np.zeros(n_keys, dtype=np.int64)
    for offset in range(n):
        keys = keys << bits | tokens[offset : offset + n_keys]
    return keys


def find(wanted: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place of each wanted key in the sorted `keys`, and whether it is there; where it is not, any valid place."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return place, keys[place] == wanted
