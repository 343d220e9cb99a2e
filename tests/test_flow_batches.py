"""Batches that come again, data that are noise, means that count alike: each heard beside what only looks like it."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_flow import B, Mixer, T, V, batch, cross_entropy, next_token, of_pairs, watched
from torch import Tensor, nn
from torch.optim import AdamW
from toy import finding, said

from moe_lab.health import Watch


@pytest.mark.parametrize(
    ("of", "told"),
    [
        (lambda step: step if step < 30 else 26 + step % 4, True),  # the last four again and again
        (lambda step: step % 2 * 100 + (step if step % 2 or step < 30 else 26 + step % 4), True),  # one of two workers
        (lambda step: step % 35, False),  # a second epoch, in the same order
        (lambda step: step // 4, False),  # several rounds over the same rollout, from the first on
        (lambda step: 0, False),  # all of a small data set, each time
    ],
)
def test_batches_that_come_again_later(of: Callable[[int], int], told: bool) -> None:
    """No tokens: what is heard of the first passes does not judge them."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer) as watch:
        for step in range(60):
            optimizer.zero_grad()
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(of(step)))
            model(x).square().mean().backward()
            model.eval()
            model(torch.ones(8, 4))  # the same each time, and no training
            model.train()
            optimizer.step()
    assert ("repeated_data" in said(watch)) == told


class Hearing(Mixer):
    def forward(self, ids: Tensor, sound: Tensor) -> Tensor:
        return super().forward(ids) + 0.1 * sound[:, :1]


@pytest.mark.parametrize("given", ["positions", "names"])
@pytest.mark.parametrize("new", [True, False])
def test_the_same_answers_to_other_sounds_are_no_repetition(new: bool, given: str) -> None:
    def loss_of(model: Callable, step: int) -> Tensor:
        ids, sound = (
            batch(step % 3),
            torch.randn(B, 9, 1, generator=torch.Generator().manual_seed(step if new else step % 3)),
        )
        logits = model(ids[:, :-1], sound) if given == "positions" else model(ids[:, :-1], sound=sound)
        return cross_entropy(logits, ids[:, 1:])

    assert said(watched(Hearing(), loss_of)) == ([] if new else ["repeated_data"])


def test_data_that_repeat_or_are_noise() -> None:
    def noise(step: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(step))
        return ids[:, :-1], ids[:, 1:]

    assert said(watched(Mixer(), lambda model, step: next_token(model, step // 4))) == ["repeated_data"]
    assert said(watched(Mixer(), of_pairs(noise))) == ["random_tokens"]

    def permuted(step: int) -> tuple[Tensor, Tensor]:  # each row by itself: frequencies are those of a text
        ids = batch(step)
        order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1000 + step)).argsort(1)
        return ids.gather(1, order)[:, :-1], ids.gather(1, order)[:, 1:]

    assert said(watched(Mixer(), of_pairs(permuted))) == ["random_tokens"]

    def twice(model: Callable, step: int) -> Tensor:  # two draws of dropout for one update
        return (next_token(model, step) + next_token(model, step)) / 2

    assert said(watched(Mixer(dropout=0.1), twice)) == []


def accumulated(reduction: str, lengths: tuple[int, int]) -> Callable:
    """Two micro-batches with targets at their first places alone, one loss."""

    def loss_of(model: Callable, step: int) -> Tensor:
        losses, targets = [], 0
        for micro, length in enumerate(lengths):
            ids = batch(2 * step + micro)
            labels = torch.where(torch.arange(T) < length, ids[:, 1:], -100)
            losses.append(cross_entropy(model(ids[:, :-1]), labels, reduction=reduction))
            targets += B * length
        return sum(losses) / (2 if reduction == "mean" else targets)

    return loss_of


def test_micro_batches_whose_means_count_alike_whatever_their_targets() -> None:
    watch = watched(Mixer(), accumulated("mean", (20, 4)))
    assert said(watch) == ["token_weights"]
    assert finding(watch, "token_weights").value == pytest.approx(5, rel=0.01)
    assert said(watched(Mixer(), accumulated("sum", (20, 4)))) == []
    assert said(watched(Mixer(), accumulated("mean", (20, 16)))) == []

    def task_weights(model: Callable, step: int) -> Tensor:  # two tasks of one size, one of them on purpose at a tenth
        return 0.9 * next_token(model, 2 * step) + 0.1 * next_token(model, 2 * step + 1)

    assert said(watched(Mixer(), task_weights)) == []


def test_losses_that_are_no_likelihood_are_left_alone() -> None:
    def rewarded(model: Callable, step: int) -> Tensor:  # rollouts several times, with advantages of both signs
        ids = batch(step // 6)
        loss = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        return (loss * torch.linspace(-1, 1, B)).mean()

    def distilled(model: Callable, step: int) -> Tensor:
        teacher = torch.randn(B, T, V, generator=torch.Generator().manual_seed(step)).softmax(-1)
        return -(teacher * model(batch(0)[:, :-1]).log_softmax(-1)).sum(-1).mean()

    for loss_of in (rewarded, distilled):
        watch = watched(Mixer("all"), loss_of, 11)
        assert watch.state.forward.heard.found == [] and not watch.state.forward.heard.was_tried


@pytest.mark.parametrize("n_batches", [1, 100])
def test_one_batch_over_and_over_is_good_to_know(n_batches: int) -> None:
    """A full batch is meant so."""
    watch = watched(Mixer(), lambda model, step: next_token(model, step % n_batches), n=30)
    told = [f.value for f in watch.findings if f.rule == "repeated_data" and f.severity == "info"]
    assert told == ([] if n_batches > 1 else [30])


@pytest.mark.parametrize("share", [0.9, 0.4])
def test_where_less_than_half_is_asked_for_no_order_is_looked_for(share: float) -> None:
    def noise(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(V, (B, T + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:].masked_fill(torch.rand(B, T, generator=generator) > share, -100)

    assert ("random_tokens" in said(watched(Mixer(), of_pairs(noise)))) == (share > 0.5)


class Translating(nn.Module):
    """Tokens that an encoder's tell, one by one, or nothing does."""

    def __init__(self, is_told: bool) -> None:
        super().__init__()
        self.is_told, self.source, self.target = is_told, nn.Embedding(V, 16), nn.Embedding(V, 16)
        self.head = nn.Linear(16, V)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        told = self.source(source) if self.is_told else 0.0
        return self.head(self.target(target) + told)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_decoder_may_be_told_what_looks_random(is_told: bool) -> None:
    def loss_of(model: Callable, step: int) -> Tensor:
        ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(step))
        return cross_entropy(model(ids[:, 1:] * 3 % V, ids[:, :-1]), ids[:, 1:])

    assert ("random_tokens" in said(watched(Translating(is_told), loss_of))) == (not is_told)


class Replaced(Mixer):
    """A copy of the table takes its place, as that of an adapter does."""

    def __init__(self) -> None:
        super().__init__()
        self.original = self._modules.pop("embedding").requires_grad_(False)
        self.embedding = copy.deepcopy(self.original).requires_grad_(True)


def test_tokens_are_heard_at_a_table_that_took_another_s_place() -> None:
    def twice(step: int) -> tuple[Tensor, Tensor]:
        return batch(step)[:, :-2], batch(step)[:, 2:]

    assert "label_shift" in said(watched(Replaced(), of_pairs(twice)))
