import math
import os
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest

from moe_lab.config import ConfigError, DataConfig, ModelConfig
from moe_lab.data import loss_floors, prepare
from moe_lab.data.ngrams import witten_bell, witten_bell_probabilities


def naive(train: list[int], stream: list[int], vocab_size: int, order: int) -> list[float]:
    """Witten-Bell by the recursion as the papers print it, with dicts of counts."""
    followers = defaultdict(Counter)
    for n in range(1, order + 1):
        for end in range(n - 1, len(train)):
            followers[tuple(train[end - n + 1 : end])][train[end]] += 1

    def p(word: int, history: tuple[int, ...], n: int) -> float:
        if n == 0:
            return 1 / vocab_size
        lower = p(word, history[1:], n - 1)
        seen = followers.get(history)
        return lower if seen is None else (seen[word] + len(seen) * lower) / (seen.total() + len(seen))

    targets = range(1, len(stream))
    return [p(stream[t], tuple(stream[max(0, t - order + 1) : t]), min(order, t + 1)) for t in targets]


def test_trigram_of_ten_tokens_by_hand() -> None:
    # counts: 0 four times, 1 four times, 2 twice, 3 never; 10 tokens, 3 kinds
    # p1(w) = (c(w) + 3 / 4) / 13:  p1(0) = p1(1) = 19/52, p1(2) = 11/52, p1(3) = 3/52
    # after 0: 1 1 1 0 (4 tokens, 2 kinds); after 1: 2 2 0 (3, 2; the last 1 has no follower); after 2: 0 1 (2, 2)
    # p2(1|0) = (3 + 2 * 19/52) / 6 = 97/156;  p2(2|1) = (2 + 2 * 11/52) / 5 = 63/130;  p2(3|2) = (2 * 3/52) / 4 = 3/104
    # after 01: 2 2 0 (3, 2); after 12: 0 1 (2, 2)
    # p3(2|01) = (2 + 2 * 63/130) / 5 = 193/325;  p3(3|12) = (2 * 3/104) / 4 = 3/208;  23 and 3 are unseen: p1(0)
    train, stream = np.array([0, 1, 2, 0, 1, 0, 0, 1, 2, 1], np.uint16), np.array([0, 1, 2, 3, 0], np.uint16)
    by_hand = [Fraction(97, 156), Fraction(193, 325), Fraction(3, 208), Fraction(19, 52)]
    np.testing.assert_allclose(witten_bell_probabilities(train, stream, 4, 3), [float(p) for p in by_hand], rtol=1e-12)
    assert witten_bell(train, stream, 4, 3) == pytest.approx(-sum(math.log(p) for p in by_hand) / 4)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(7, np.uint16), (50, np.uint16), (2**21, np.uint32)])
def test_equals_a_naive_recursion(order: int, vocab_size: int, dtype) -> None:
    random = np.random.default_rng(order)
    words = random.integers(vocab_size, size=12)  # few different ones, so that histories return
    train, stream = random.choice(words, 400).astype(dtype), random.choice(words, 90).astype(dtype)
    stream[::9] = vocab_size - 1  # an unseen one now and then
    expected = naive(train.tolist(), stream.tolist(), vocab_size, order)
    np.testing.assert_allclose(witten_bell_probabilities(train, stream, vocab_size, order), expected, rtol=1e-10)


def test_training_text_shorter_than_the_order() -> None:
    train, stream = np.array([1, 2], np.uint16), np.array([1, 2, 1], np.uint16)
    np.testing.assert_allclose(witten_bell_probabilities(train, stream, 4, 3), naive([1, 2], [1, 2, 1], 4, 3))


def test_vocabulary_too_large_for_a_key() -> None:
    with pytest.raises(ConfigError, match=r"^model.vocab_size=2,097,153 .* at most 2,097,152$"):
        witten_bell(np.array([1, 2, 3]), np.array([1, 2, 3]), 2**21 + 1, 3)


def test_loss_floors_score_the_validation_targets_and_are_kept(tmp_path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 30)
    dataset = prepare(DataConfig(source=str(tmp_path / "text.txt")), ModelConfig(max_seq_len=8), tmp_path / "cache")
    floors = loss_floors(dataset)
    assert floors["uniform"] == pytest.approx(math.log(dataset.vocab_size))
    for order, name in enumerate(["unigram", "bigram", "trigram"], start=1):
        p = naive(dataset.train.tolist(), dataset.validation.tolist(), dataset.vocab_size, order)
        assert floors[name] == pytest.approx(-sum(map(math.log, p)) / (len(dataset.validation) - 1))
    assert floors["uniform"] > floors["unigram"] > floors["bigram"] > floors["trigram"]

    assert loss_floors(dataset._replace(train=None, validation=None)) == floors  # nothing is counted again
    kept = ["loss_floors.json", "meta.json", "tokenizer.json", "train.npy", "validation.npy"]
    assert sorted(os.listdir(dataset.folder)) == kept
