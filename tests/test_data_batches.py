import numpy as np
import pytest
import torch

from moe_lab.data import Batches, validation_windows

TOKENS = np.arange(100, dtype=np.uint16)  # each token is its own position; T 7: 14 windows, the last target is 98


def drawn(batches: Batches, n_batches: int) -> list[int]:
    """Start of each window in the next batches, as a number of windows."""
    return [int(row[0]) // 7 for _ in range(n_batches) for row in batches.next_batch()]


def test_a_batch_holds_windows_of_following_tokens() -> None:
    batch = Batches(TOKENS, seq_len=7, batch_size=3, seed=0).next_batch()
    assert batch.shape == (3, 8) and batch.dtype == torch.int64 and batch.device.type == "cpu"
    assert (batch - batch[:, :1] == torch.arange(8)).all() and (batch[:, 0] % 7 == 0).all()


@pytest.mark.parametrize("n_tokens", [99, 100, 105, 106])
def test_an_epoch_makes_each_token_a_target_once(n_tokens: int) -> None:
    batches = Batches(np.arange(n_tokens), seq_len=7, batch_size=1, seed=0)
    targets = torch.cat([batches.next_batch()[0, 1:] for _ in range((n_tokens - 1) // 7)])
    assert sorted(targets.tolist()) == list(range(1, (n_tokens - 1) // 7 * 7 + 1))


def test_each_epoch_is_another_permutation_and_batches_run_across_the_border() -> None:
    starts = drawn(Batches(TOKENS, 7, batch_size=4, seed=0), 7)  # 28 windows: two epochs, the border inside a batch
    assert sorted(starts[:14]) == sorted(starts[14:]) == list(range(14))
    assert starts[:14] != starts[14:] and starts[:14] != list(range(14))


def test_the_order_follows_from_the_seed_alone() -> None:
    orders = [drawn(Batches(TOKENS, 7, 4, seed), 7) for seed in (0, 0, 1, 2**30, 2**31 - 1)]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders[1:]}) == 4
    assert orders[0][14:] != orders[2][:14]  # epoch 1 of seed 0 is not epoch 0 of seed 1


def test_a_batch_larger_than_an_epoch() -> None:
    starts = drawn(Batches(TOKENS[:15], 7, batch_size=5, seed=0), 2)  # two windows an epoch
    assert [sorted(starts[i : i + 2]) for i in range(0, 10, 2)] == [[0, 1]] * 5


@pytest.mark.parametrize("n_before", [0, 2, 3, 7, 9])  # 3.5 batches an epoch: inside one, past one, at a border
def test_resume_goes_on_with_the_same_batches(n_before: int) -> None:
    first = Batches(TOKENS, 7, 4, seed=3)
    drawn(first, n_before)
    state = first.state_dict()
    assert state.keys() == {"epoch", "position"}
    second = Batches(TOKENS, 7, 4, seed=3)
    second.load_state_dict(state)
    assert drawn(second, 9) == drawn(first, 9)


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 15, 16, 99, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_validation_makes_each_token_but_the_first_a_target_once(n_tokens: int, batch_size: int) -> None:
    windows = list(validation_windows(TOKENS[:n_tokens], 7, batch_size))
    assert torch.cat([window[:, 1:].flatten() for window in windows]).tolist() == list(range(1, n_tokens))
    assert all(w.dtype == torch.int64 and w.shape[0] <= batch_size and w.shape[1] <= 8 for w in windows)
    assert all((w[:, 1:] - w[:, :-1] == 1).all() for w in windows)  # the inputs are the tokens before the targets
    assert all(w.shape[1] == 8 for w in windows[:-1]), "only the last window may be shorter, alone in its batch"
