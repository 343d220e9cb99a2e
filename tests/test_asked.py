"""What a loss asks of a model's outputs, as its graph tells: each fault beside losses and shapes that are meant."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_flow import Mixer, V, batch, of_pairs, watched
from torch import Tensor, nn
from torch.optim import AdamW
from toy import finding, said

from moe_lab.health import Watch, examine
from moe_lab.health.during.report import unchecked

WAY = torch.randn(10, 6, generator=torch.Generator().manual_seed(7))


def inputs(step: int, rows: int = 32) -> Tensor:
    return torch.randn(rows, 10, generator=torch.Generator().manual_seed(step))


def net(*last: nn.Module, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, outputs), *last)


def trained(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], has_graph: bool = True) -> Watch:
    """`loss_of(outputs, numbers (B, 6))`."""
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    with Watch(model, optimizer, quiet=True) as watch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own word on shapes that differ
        for step in range(11):
            x = inputs(step)
            optimizer.zero_grad()
            loss = loss_of(model(x), x @ WAY)
            loss.backward()
            optimizer.step()
            watch.observe(loss=loss if has_graph else loss.detach())
    return watch


def by_hand(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).mean()


@pytest.mark.parametrize(
    "loss", [F.mse_loss, by_hand, lambda a, b: by_hand(b, a), F.l1_loss, F.smooth_l1_loss, F.huber_loss]
)
def test_targets_that_broadcast_beside_outputs(loss: Callable) -> None:
    """(B, 1) beside (B,), either way round."""
    found = finding(trained(net(), lambda out, told: loss(out, told[:, 0])), "shared_target")
    assert found.severity == "warning" and found.value == 32 and "(B,) beside (B, 1)" in found.advice
    assert "shared_target" in said(trained(net(nn.Flatten(0)), lambda out, told: loss(out, told[:, :1])))
    assert "shared_target" not in said(trained(net(), lambda out, told: loss(out, told[:, :1])))
    assert "shared_target" not in said(trained(net(), lambda out, told: loss(out[:, 0], told[:, 0])))


ONE_NUMBER = {
    "absolute errors": lambda out, told: F.l1_loss(out, told[:, :1]),
    "weights of the rows": lambda out, told: (told[:, 1:2].exp() * (out - told[:, :1]) ** 2).mean(),
    "a mask (B, 1)": lambda out, told: ((out - told[:, :1]) ** 2 * (told[:, 1:2] > 0)).sum(),
    "true and false": lambda out, told: F.binary_cross_entropy_with_logits(out, (told[:, :1] > 0).float()),
    "true alone": lambda out, told: F.binary_cross_entropy_with_logits(out, torch.ones_like(out)),
    "one number for good": lambda out, told: F.mse_loss(out, torch.ones_like(out)),
    "their own mean": lambda out, told: F.mse_loss(out, (out.mean() + 1).detach().expand_as(out)),
    "each beside each": lambda out, told: F.softplus((out - out.T) * (told[:, :1] < told[:, 0]).float()).mean(),
    "each beside each target": lambda out, told: (out[:, 0].unsqueeze(1) - told[:, 0]).abs().min(1).values.mean(),
    "a normaliser": lambda out, told: out.logsumexp(0).sum() - out[:4].sum(),
    "a mean over the batch": lambda out, told: (out.mean() - told[:, 0].mean()) ** 2,
}


@pytest.mark.parametrize("kind", ONE_NUMBER)
def test_targets_that_are_shared_on_purpose_or_not_at_all(kind: str) -> None:
    assert "shared_target" not in said(trained(net(), ONE_NUMBER[kind]))


# ---- squashed twice --------------------------------------------------------------------------------------------------


def classes(told: Tensor) -> Tensor:
    return told.argmax(1)


def hot(told: Tensor) -> Tensor:
    return F.one_hot(classes(told), told.shape[1]).float()


CE, BCE = F.cross_entropy, F.binary_cross_entropy_with_logits
SQUASHED = {
    "softmax in the model": (nn.Softmax(-1), lambda out, told: CE(out, classes(told)), "a softmax"),
    "softmax in the loss": (None, lambda out, told: CE(out.softmax(-1), classes(told)), "a softmax"),
    "in 16 bits, rearranged": (
        None,
        lambda out, told: CE(out.softmax(-1).bfloat16().view(4, 8, 6).flatten(0, 1).float(), classes(told)),
        "a softmax",
    ),
    "classes with weights": (
        nn.Softmax(-1),
        lambda out, told: CE(out, classes(told), weight=WAY[0].exp()),
        "a softmax",
    ),
    "sigmoid in the model": (nn.Sigmoid(), lambda out, told: CE(out, classes(told)), "a sigmoid"),
    "sigmoid in the loss": (None, lambda out, told: CE(out.sigmoid(), classes(told)), "a sigmoid"),
    "sigmoid twice": (nn.Sigmoid(), lambda out, told: BCE(out, hot(told)), "a sigmoid"),
    "sigmoid twice in the loss": (None, lambda out, told: BCE(out.sigmoid(), hot(told)), "a sigmoid"),
}
PLAIN = {
    "logits": (None, lambda out, told: CE(out, classes(told))),
    "log-probabilities": (nn.LogSoftmax(-1), lambda out, told: F.nll_loss(out, classes(told))),
    "log-probabilities once more": (nn.LogSoftmax(-1), lambda out, told: CE(out, classes(told))),  # changes nothing
    "logarithms of shares": (nn.Softmax(-1), lambda out, told: F.nll_loss(out.log(), classes(told))),
    "binary of shares": (nn.Sigmoid(), lambda out, told: F.binary_cross_entropy(out, hot(told))),
    "binary of logits": (None, lambda out, told: BCE(out, hot(told))),
    "squares of shares": (nn.Softmax(-1), lambda out, told: F.mse_loss(out, hot(told))),
    "squares of sigmoids": (nn.Sigmoid(), lambda out, told: F.mse_loss(out, hot(told))),
    "smoothed labels": (None, lambda out, told: CE(out, classes(told), label_smoothing=0.1)),
    "cosines over a temperature": (None, lambda out, told: CE(F.normalize(out, dim=-1) / 0.1, classes(told))),
    "a teacher": (None, lambda out, told: CE(out, (told / 2).softmax(-1))),
    "a teacher's temperature": (None, lambda out, told: F.kl_div((out / 2).log_softmax(-1), told.softmax(-1))),
    "next to nothing": (None, lambda out, told: CE(1e-4 * out, classes(told))),
    "zero logits": (nn.Threshold(1e9, 0.0), lambda out, told: CE(out, classes(told))),
    "capped logits": (None, lambda out, told: CE(10 * (out / 10).tanh(), classes(told))),
}


@pytest.mark.parametrize("kind", SQUASHED)
def test_a_softmax_or_sigmoid_before_a_loss_that_makes_one(kind: str) -> None:
    last, loss, told = SQUASHED[kind]
    found = finding(trained(net(*[last] * (last is not None), outputs=6), loss), "squashed_twice")
    assert found.severity == "warning" and found.message.startswith(f"{told} comes before")


@pytest.mark.parametrize("kind", PLAIN)
def test_losses_that_squash_once(kind: str) -> None:
    last, loss = PLAIN[kind]
    assert "squashed_twice" not in said(trained(net(*[last] * (last is not None), outputs=6), loss))


def test_before_the_first_update_and_of_a_loss_without_its_graph() -> None:
    told = examine(net(outputs=6), inputs(0), lambda model, x: CE(model(x).softmax(-1), classes(x @ WAY)))
    assert [f.rule for f in told.findings if f.severity == "warning"] == ["squashed_twice"]
    watch = trained(net(nn.Softmax(-1), outputs=6), lambda out, told: CE(out, classes(told)), has_graph=False)
    assert said(watch) == [] and "how outputs are held against targets" in unchecked(watch.state)


def test_one_output_that_is_true_or_false() -> None:
    true = lambda told: (told[:, :1] > 0).float()  # noqa: E731
    assert "squashed_twice" in said(trained(net(nn.Sigmoid()), lambda out, told: BCE(out, true(told))))
    assert said(trained(net(nn.Sigmoid()), lambda out, told: F.binary_cross_entropy(out, true(told)))) == []


def aligned(letters: int) -> Callable:
    """CTC of 32 texts of so many letters each, in 16 steps."""

    def loss(out: Tensor, told: Tensor) -> Tensor:
        scores, targets = out.view(16, 32, 6).log_softmax(-1), 1 + classes(told).view(32, 16)[:, :letters] % 5
        return F.ctc_loss(scores, targets, [16] * 32, [letters] * 32, zero_infinity=True)

    return loss


OUT_OF_RANGE = {
    "more letters than steps": (None, aligned(16), "infinite CTC loss"),
    "shares for their logarithms": (nn.Softmax(-1), lambda out, told: F.nll_loss(out, classes(told)), "sum to"),
    "logits for log-probabilities": (
        None,
        lambda out, told: F.nll_loss(out[..., None], classes(told)[:, None]),
        "sum to",
    ),
    "a ReLU and targets below 0": (nn.ReLU(), F.mse_loss, "0 to inf, which is all that relu can give"),
    "a sigmoid and targets of any size": (nn.Sigmoid(), F.smooth_l1_loss, "0 to 1, which is all that sigmoid"),
    "a tanh and targets of any size": (nn.Tanh(), F.huber_loss, "-1 to 1, which is all that tanh"),
    "a ReLU, squared by hand": (nn.ReLU(), by_hand, "0 to inf, which is all that relu can give"),
    "a sigmoid, the other way round": (
        nn.Sigmoid(),
        lambda out, told: by_hand(told, out),
        "0 to 1, which is all that sigmoid",
    ),
    "a tanh, without the sign": (nn.Tanh(), F.l1_loss, "-1 to 1, which is all that tanh"),
    "labels of -1 and 1": (None, lambda out, told: BCE(out, told.sign()), "0 to 1, which is all that binary"),
}
IN_RANGE = PLAIN | {
    "fewer letters than steps": (None, aligned(5)),
    "a ReLU and targets above 0": (nn.ReLU(), lambda out, told: F.mse_loss(out, told.abs())),
    "a ReLU, squared by hand": (nn.ReLU(), lambda out, told: by_hand(out, told.abs())),
    "a sigmoid, the other way round": (nn.Sigmoid(), lambda out, told: by_hand(hot(told), out)),
    "a softplus, by hand": (nn.Softplus(), by_hand),
    "a tanh and pictures": (nn.Tanh(), lambda out, told: F.mse_loss(out, told.sin())),
    "a target in fifty": (nn.Sigmoid(), lambda out, told: F.mse_loss(out, hot(told) + (told > 7))),
    "targets of any size": (None, F.mse_loss),
}


def out_of_range(last: nn.Module | None, loss: Callable) -> list[str]:
    model = net(*[last] * (last is not None), outputs=6)
    found = examine(model, inputs(0, 512), lambda model, x: loss(model(x), x @ WAY)).findings
    return [f.message for f in found if f.rule == "out_of_range"]


@pytest.mark.parametrize("kind", OUT_OF_RANGE)
def test_what_a_loss_is_not_made_for(kind: str) -> None:
    last, loss, told = OUT_OF_RANGE[kind]
    (message,) = out_of_range(last, loss)
    assert told in message


@pytest.mark.parametrize("kind", IN_RANGE)
def test_losses_that_are_given_what_they_are_made_for(kind: str) -> None:
    assert out_of_range(*IN_RANGE[kind]) == []


@pytest.mark.parametrize("first", ["observe", "backward"])
def test_a_watch_sees_the_targets_of_a_loss_that_is_observed_before_its_backward_pass(first: str) -> None:
    model = net(nn.ReLU(), outputs=6)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(11):
            optimizer.zero_grad()
            loss = F.mse_loss(model(inputs(step)), inputs(step) @ WAY)
            calls = [lambda loss=loss: watch.observe(loss=loss), loss.backward]
            for call in calls if first == "observe" else calls[::-1]:
                call()
            optimizer.step()
    assert ("out_of_range" in said(watch)) == (first == "observe")


# ---- encoders and decoders, windows ----------------------------------------------------------------------------------


class Pair(nn.Module):
    """An encoder and a decoder whose modules of tokens share their weights, as those of transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.encoder, self.decoder = nn.Embedding(V, 32), nn.Embedding(V, 32), nn.Embedding(V, 32)
        self.encoder.weight = self.decoder.weight = self.shared.weight
        self.mixed, self.head = nn.Linear(32, 32), nn.Linear(32, V, bias=False)

    def forward(self, ids: Tensor, begun: Tensor) -> Tensor:
        seen = self.encoder(ids).mean(1, keepdim=True)
        return self.head(self.mixed(self.decoder(begun) + seen))


@pytest.mark.parametrize("is_shifted", [True, False])
def test_a_decoder_that_is_given_its_own_answers(is_shifted: bool) -> None:
    def loss_of(model: Callable, step: int) -> Tensor:
        ids = batch(step)
        begun = F.pad(ids[:, :-1], (1, 0)) if is_shifted else ids
        return CE(model(batch(1000 + step), begun).flatten(0, 1), ids.flatten())

    watch = watched(Pair(), loss_of)
    assert watch.state.forward.heard.passes and ("label_shift" in said(watch)) == (not is_shifted)


def test_holes_in_a_decoders_answers_are_filled_and_no_end() -> None:
    """Masked words alone are asked for, and what is no target stands as padding in a decoder's inputs."""

    def loss_of(model: Callable, step: int) -> Tensor:
        ids = batch(step)
        holes = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step)) < 0.9
        begun = F.pad(ids.masked_fill(holes, 0)[:, :-1], (1, 0))
        return CE(model(ids, begun).flatten(0, 1), ids.masked_fill(holes, -100).flatten())

    watch = watched(Pair(), loss_of)
    assert watch.state.forward.heard.is_next_token and said(watch) == []


AVERAGES = {
    "as it comes": (F.kl_div, torch.optim.SGD, True),
    "by hand": (lambda logp, told: (told * (told.log() - logp)).mean(), torch.optim.SGD, True),
    "cross-entropy by hand": (lambda logp, told: -(logp * told).mean(), torch.optim.SGD, True),
    "under Adam": (F.kl_div, AdamW, False),
    "of a batch": (lambda logp, told: F.kl_div(logp, told, reduction="batchmean"), torch.optim.SGD, False),
    "summed first": (lambda logp, told: -(logp * told).sum(-1).mean(), torch.optim.SGD, False),
    "smoothed": (lambda logp, told: F.nll_loss(logp, told.argmax(-1)) - logp.mean(), torch.optim.SGD, False),
    "chosen": (lambda logp, told: -(logp.gather(1, told.argmax(-1)[:, None]) * 2).mean(), torch.optim.SGD, False),
    "of few": (lambda logp, told: -(logp[:, :4].log_softmax(-1) * told[:, :4]).mean(), torch.optim.SGD, False),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_mean_over_the_classes_too(kind: str) -> None:
    """Adam's steps know no scale of the loss, and SGD's do."""
    (loss, kind_of_optimizer, is_told), model = AVERAGES[kind], net(outputs=16)
    x = inputs(0)
    given = (x, (x @ torch.randn(10, 16)).softmax(-1))
    optimizer = kind_of_optimizer(model.parameters(), lr=0.1)
    seen = examine(model, given, lambda model, batch: loss(model(batch[0]).log_softmax(-1), batch[1]), optimizer)
    told = [f for f in seen.findings if f.rule == "starved_steps"]
    assert [f.value for f in told] == ([16] if is_told else [])


TEXT = batch(3, 1, 5000)[0]
WINDOWS = {
    "one place on, in a batch": (lambda step: 8 * step + torch.arange(8), True),
    "one place back": (lambda step: 4000 - 8 * step - torch.arange(8), True),
    "streams, one place on": (lambda step: 500 * torch.arange(8) + step, True),
    "by halves": (lambda step: 12 * (8 * step + torch.arange(8)), False),
    "side by side": (lambda step: 24 * (8 * step + torch.arange(8)), False),
    "streams, side by side": (lambda step: 500 * torch.arange(8) + 24 * step, False),
    "shuffled": (lambda step: torch.randint(900, (8,), generator=torch.Generator().manual_seed(step)), False),
}


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_that_are_their_neighbours_moved_on(kind: str) -> None:
    starts, is_told = WINDOWS[kind]

    def rows(step: int) -> tuple[Tensor, Tensor]:
        ids = TEXT[starts(step)[:, None] + torch.arange(25)]
        return ids[:, :-1], ids[:, 1:]

    assert ("one_text" in said(watched(Mixer(), of_pairs(rows)))) == is_told
