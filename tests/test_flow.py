"""What a watch hears in the first passes: targets, data, looks into the future, modes. Each fault beside look-alikes that are none."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from toy import finding, said

from moe_lab.health import Watch, examine

V, B, T, END, PAD = 48, 8, 24, 1, 2


def batch(step: int, rows: int = B, length: int = T + 1) -> Tensor:
    """Tokens as unevenly frequent as those of a text, every other one told by the one before, (rows, length)."""
    ids = (torch.rand(rows, length, generator=torch.Generator().manual_seed(step)) ** 3 * (V - 3)).long()
    ids[:, 1::2] = (7 * ids[:, : length - 1 : 2] + 5) % (V - 3)
    return ids + 3


class Mixer(nn.Module):
    """Embedding, a mean over `sees` ("past", "all", or the half that a router chooses), feed-forward with dropout, a head."""

    def __init__(self, sees: str = "past", dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.sees = sees
        self.embedding, self.head = nn.Embedding(V, 32), nn.Linear(32, V, bias=False)
        self.router, self.up, self.down = nn.Linear(32, 1), nn.Linear(32, 64), nn.Linear(64, 32)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        weight = torch.ones(ids.shape[1], ids.shape[1], device=ids.device)
        weight = weight if self.sees == "all" else weight.tril()
        x = x + (weight / weight.sum(1, keepdim=True)) @ x
        y = self.down(self.dropout(F.gelu(self.up(x))))
        score = self.router(x)
        if self.sees == "chosen":
            chosen = score.topk(ids.shape[1] // 2, dim=1).indices
            y = torch.zeros_like(y).scatter(1, chosen.expand(-1, -1, 32), y.gather(1, chosen.expand(-1, -1, 32)))
        return self.head(x + y * score.sigmoid())


def cross_entropy(logits: Tensor, labels: Tensor, **options) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


def next_token(model: Callable, step: int) -> Tensor:
    ids = batch(step)
    return cross_entropy(model(ids[:, :-1]), ids[:, 1:])


def watched(
    model: nn.Module, loss_of: Callable[[Callable, int], Tensor], n: int = 12, after: Callable = lambda step: None
) -> Watch:
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    watch = Watch(model, optimizer)
    for step in range(n):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        watch.observe(loss=loss.detach())
        after(step)
    watch.check()
    return watch


def test_text_and_a_causal_model_are_healthy_and_heard() -> None:
    watch = watched(Mixer(), next_token, 11)
    assert watch.findings == []
    heard = watch.state.forward.heard
    assert heard.is_next_token and heard.was_tried
    assert len(heard.passes) == 11 and torch.equal(heard.passes[3].tokens.labels, batch(3)[:, 1:])
    assert heard.passes[3].weight == pytest.approx(1 / (B * T), rel=1e-3) and heard.passes[3].update == 4
    assert heard.first_loss == pytest.approx(float(next_token(Mixer(), 0)), abs=1e-4)


@dataclass
class Answer:
    loss: Tensor
    logits: Tensor


class Inside(Mixer):
    """The loss inside the model, which shifts the labels itself, as transformers do."""

    def forward(self, *, input_ids: Tensor, labels: Tensor) -> Answer:
        logits = super().forward(input_ids)
        return Answer(cross_entropy(logits[:, :-1], labels[:, 1:]), logits)


class TimeFirst(Mixer):
    """(T, B) in, and log-probabilities (T·B, V) out."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)
        weight = torch.ones(x.shape[1], x.shape[1])
        weight = weight if self.sees == "all" else weight.tril()
        x = x + (weight / weight.sum(1, keepdim=True)) @ x
        x = x + self.down(F.gelu(self.up(x))) * self.router(x).sigmoid()
        return self.head(x.transpose(0, 1)).flatten(0, 1).log_softmax(-1)


def time_first(model: Callable, step: int) -> Tensor:
    ids = batch(step).T
    return F.nll_loss(model(ids[:-1]), ids[1:].flatten())


FORMS = {
    "labels outside": (Mixer, next_token),
    "loss inside": (Inside, lambda model, step: model(input_ids=batch(step), labels=batch(step)).loss),
    "time first": (TimeFirst, time_first),
}


@pytest.mark.parametrize(("kind", "loss_of"), FORMS.values(), ids=FORMS)
def test_a_model_that_sees_the_future_in_every_form(kind, loss_of) -> None:
    assert finding(watched(kind("all"), loss_of), "future_leak").severity == "error"
    watch = watched(kind("past"), loss_of, 11)
    assert said(watch) == [] and watch.state.forward.heard.was_tried


def test_a_choice_over_time_is_told_apart_from_a_leak() -> None:
    watch = watched(Mixer("chosen"), next_token)
    assert said(watch) == [] and finding(watch, "future_leak").severity == "info"


def masked(model: Callable, step: int) -> Tensor:
    ids = batch(step)
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step)) < 0.3
    return cross_entropy(model(torch.where(hidden, PAD, ids)), torch.where(hidden, ids, -100))


def test_a_model_that_is_meant_to_look_both_ways_may() -> None:
    watch = watched(Mixer("all"), masked)
    assert said(watch) == [] and not watch.state.forward.heard.was_tried


def test_a_pass_that_is_repeated_leaves_no_trace() -> None:
    def run(watching: bool) -> list:
        model = Mixer("chosen", dropout=0.3)
        model.total = torch.zeros(())  # no buffer
        model.up.register_forward_hook(lambda *args: model.total.add_(1) and None)
        optimizer = AdamW(model.parameters(), lr=2e-3)
        watch = Watch(model, optimizer) if watching else None
        torch.manual_seed(1)
        for step in range(12):
            optimizer.zero_grad()
            next_token(model, step).backward()
            optimizer.step()
        assert not watching or watch.state.forward.heard.was_tried
        return [torch.get_rng_state(), model.total, *model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def padded(step: int, fill: int, is_end_asked: bool) -> tuple[Tensor, Tensor]:
    """Rows that end somewhere, an end token, and padding that is no target."""
    ids, generator = batch(step), torch.Generator().manual_seed(step)
    ends = torch.randint(8, T - 4, (B, 1), generator=generator)
    at = torch.arange(T + 1)
    ids = torch.where(at > ends, fill, torch.where(at == ends, END, ids))
    labels = torch.where((at > ends) | ((at == ends) & (not is_end_asked)), -100, ids)
    return ids[:, :-1], labels[:, 1:]


def of_pairs(pairs: Callable[[int], tuple[Tensor, Tensor]]) -> Callable:
    def loss_of(model: Callable, step: int) -> Tensor:
        ids, labels = pairs(step)
        return cross_entropy(model(ids), labels)

    return loss_of


def test_an_end_token_that_is_never_a_target() -> None:
    assert said(watched(Mixer(), of_pairs(lambda step: padded(step, END, False)))) == ["never_a_target"]
    assert said(watched(Mixer(), of_pairs(lambda step: padded(step, END, True)))) == []
    assert said(watched(Mixer(), of_pairs(lambda step: padded(step, PAD, True)))) == []


def test_targets_in_the_wrong_place_and_padding_among_them() -> None:
    def shifted(step: int) -> tuple[Tensor, Tensor]:
        ids = batch(step)
        return ids[:, :-2], ids[:, 2:]

    def asked(step: int) -> tuple[Tensor, Tensor]:
        ids, _ = padded(step, PAD, True)
        ids[: B // 2, T // 2 :] = PAD
        return ids[:, :-1], ids[:, 1:]

    assert "label_shift" in said(watched(Mixer(), of_pairs(shifted)))
    assert said(watched(Mixer(), of_pairs(asked))) == ["padding_in_loss"]


def cloze(step: int, is_shown: bool) -> tuple[Tensor, Tensor]:
    """A sixth of the places is asked for; END stands there, but for a tenth of them, or the answer does."""
    ids, generator = batch(step)[:, :-1], torch.Generator().manual_seed(step)
    asked = torch.rand(ids.shape, generator=generator) < 0.15
    hidden = asked & (torch.rand(ids.shape, generator=generator) < 0.9)
    return torch.where(hidden & (not is_shown), END, ids), torch.where(asked, ids, -100)


@pytest.mark.parametrize("kind", ["past", "all"])
def test_answers_that_stand_in_the_input(kind: str) -> None:
    def copied(step: int) -> tuple[Tensor, Tensor]:
        return batch(step), batch(step)

    found = finding(watched(Mixer(kind), of_pairs(copied)), "label_shift")
    assert found.severity == "error" and "100% of the targets are the very token" in found.message
    assert said(watched(Mixer("all"), of_pairs(partial(cloze, is_shown=True)))) == ["label_shift"]
    assert said(watched(Mixer("all"), of_pairs(partial(cloze, is_shown=False)))) == []


def modes(model: nn.Module, change: Callable[[int], None], n: int = 45) -> list[tuple[str, str]]:
    return [(f.rule, f.severity) for f in watched(model, next_token, n, after=change).findings if f.severity != "info"]


def test_updates_in_evaluation_mode() -> None:
    model = Mixer(dropout=0.2)
    assert modes(model, lambda step: model.eval() if step == 12 else None) == [("evaluation_mode", "error")]
    never = Mixer(dropout=0.2).eval()
    assert modes(never, lambda step: None) == [("evaluation_mode", "warning")]
    back = Mixer(dropout=0.2)
    assert modes(back, lambda step: back.eval() and back.train() if step % 5 == 0 else None) == []
    once = Mixer(dropout=0.2)  # in evaluation mode at one look out of three
    assert modes(once, lambda step: once.train(step != 14)) == []
    part = Mixer(dropout=0.2)
    part.dropout.eval()  # on purpose, the rest of the model trains
    assert modes(part, lambda step: None) == []
    assert modes(Mixer().eval(), lambda step: None) == []  # no module in which the mode makes a difference


def test_a_first_loss_with_other_terms_in_it_is_judged_by_its_own_cross_entropy() -> None:
    def told(loss_of: Callable) -> list[str]:
        return [f.rule for f in watched(Mixer(), loss_of).findings]

    assert told(lambda model, step: next_token(model, step) + 0.6) == []  # an auxiliary term
    assert told(lambda model, step: next_token(model, step) / 4) == ["initial_loss"]
    tied = Mixer()
    nn.init.normal_(tied.embedding.weight, std=0.2)
    tied.head.weight = tied.embedding.weight  # says the token that it reads, from the start
    assert watched(tied, next_token).findings == []


@pytest.mark.parametrize(
    ("momentum", "budget", "scale", "told"),
    [(1e-4, None, 3.0, True), (1e-4, 100, 3.0, True), (0.1, None, 3.0, False), (0.01, None, 3.0, False)]
    + [(1e-4, 100_000, 3.0, False), (1e-4, None, 1.0, False)],  # time enough; batches that are like a fresh norm's
)
def test_batch_norms_that_keep_a_fresh_model_s_statistics(momentum, budget, scale: float, told: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with Watch(model, optimizer, budget=budget) as watch:
        for _ in range(70):
            optimizer.zero_grad()
            model(scale * torch.randn(64, 8) + scale - 1).square().mean().backward()
            optimizer.step()
    assert ("mode_mismatch" in said(watch)) == told


def test_a_pass_that_cannot_be_repeated_is_told_as_not_checked(capsys: pytest.CaptureFixture) -> None:
    class Once(Mixer):
        def forward(self, ids: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                raise RuntimeError("trains\nalone")
            return super().forward(ids)

    watch = watched(Once(), next_token)
    watch.report()
    line = "not checked: whether the model sees the future: its pass could not be repeated: RuntimeError: trains alone"
    assert said(watch) == [] and line in capsys.readouterr().out.splitlines()
    watched(Mixer(), next_token).report()
    assert "the future" not in capsys.readouterr().out  # it was looked at
    watched(Mixer(), lambda model, step: model(batch(step)[:, :-1]).square().mean()).report()
    assert "shows (the future, memory" in capsys.readouterr().out


class Sorting(nn.Module):
    """Kinds of texts: by their tokens, or by those of others at the same place."""

    def __init__(self, batch_first: bool = True):
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=batch_first)
        self.norm, self.out = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.norm(self.layer(self.tokens(ids)).mean(1)))


class Drops(Sorting):
    def forward(self, ids: Tensor) -> Tensor:
        return F.dropout(super().forward(ids), 0.5, training=not self.training)


class Nodes(nn.Module):
    """A graph's: each hears of all others, and may."""

    def __init__(self, square: bool):
        super().__init__()
        self.out, self.square = nn.Linear(8, 3), square

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT if self.square else self.out(x) + self.out(x).mean(0)).squeeze(-1)


@pytest.mark.parametrize("kind", ["its own", "beside it", "nodes", "pairs", "drops"])
def test_examples_that_hear_of_each_other(kind: str) -> None:
    torch.manual_seed(0)
    by_kind = {"nodes": partial(Nodes, False), "pairs": partial(Nodes, True), "drops": Drops}
    model = by_kind.get(kind, partial(Sorting, kind == "its own"))()
    x = torch.randn(6, 8) if isinstance(model, Nodes) else torch.randint(20, (6, 5))
    found = examine(model, (x, torch.randint(3, (6,))), lambda model, b: F.cross_entropy(model(b[0]), b[1])).findings
    assert [f.where for f in found if f.rule == "future_leak"] == ["batch"] * (kind == "beside it")
    assert ("dropout" in [f.where for f in found if f.rule == "mode_mismatch"]) == (kind == "drops")


class Spoken(nn.Module):
    """(B, T, …) in; frames come first in what it gives, as torch's CTC wants them: by a transpose, or by a reshape that mixes them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.scores, self.way = nn.Linear(6, 5), way

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        by_time = scores.transpose(0, 1) if self.way == "transposed" else scores.reshape(x.shape[1], x.shape[0], -1)
        return by_time.log_softmax(-1)


@pytest.mark.parametrize("way", ["transposed", "reshaped"])
def test_frames_of_other_examples_when_time_comes_first(way: str) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: tuple) -> Tensor:
        scores = model(batch[0])
        n, t = batch[1].shape[0], scores.shape[0]
        return F.ctc_loss(scores, batch[1], torch.full((n,), t), torch.full((n,), 3))

    found = examine(Spoken(way), (torch.randn(7, 12, 6), torch.randint(1, 5, (7, 3))), loss).findings
    assert [f.where for f in found if f.rule == "future_leak"] == ["batch"] * (way == "reshaped")
