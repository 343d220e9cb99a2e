"""The order of zero_grad, backward, clip and step: each mistake beside loops that only look like it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy import VOCAB, adamw, said, toy

from moe_lab.health import Finding, Watch

EVENTS = {"no_updates", "stale_gradients", "cleared_gradients"}


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(model.embedding.num_embeddings, (2, 8))
    return F.cross_entropy(model(ids).float().flatten(0, -2), ids.flatten())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def watched(model, optimizers, step, n: int = 60) -> set[str]:
    """The rules that speak while `step(i)` is called n times; a loss that it returns is observed."""
    with Watch(model, optimizers) as watch:
        for i in range(n):
            if (loss := step(i)) is not None:
                watch.observe(loss=loss)
    return set(said(watch))


def seen(loop, n: int = 20, begins: int = 0) -> list[Finding]:
    """What the rules about events say while `loop(model, optimizer, i)` is called n times, and a sound loop before that."""
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        for i in range(n):
            watch.observe(loss=(loop if i >= begins else sound)(model, optimizer, i))
    return [f for f in watch.findings if f.rule in EVENTS]


def found(loop, n: int = 20) -> set[str]:
    return {finding.rule for finding in seen(loop, n)}


def halves(model) -> list[torch.optim.Optimizer]:
    """An optimizer of the matrices and one of the vectors."""
    parts = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    return [torch.optim.AdamW(part, lr=0.01) for part in parts]


def sound(model, optimizer, i, set_to_none: bool = True):
    optimizer.zero_grad(set_to_none=set_to_none)
    loss = loss_of(model)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


def accumulated(model, optimizer, i):
    loss = loss_of(model)
    (loss / 4).backward()
    if i % 4 == 3:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def as_a_discriminator(model, optimizer, i):
    """The generator's backward pass fills its gradients as well; they go before its own. Nobody watches the generator."""
    scale = nn.Parameter(torch.ones(()))
    (scale * loss_of(model)).backward()
    torch.optim.SGD([scale], lr=0.1).step()
    return sound(model, optimizer, i)


def zeros(model, optimizer, i):
    return sound(model, optimizer, i, set_to_none=False)


def closure(model, optimizer, i):
    def again():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return optimizer.step(again)


def perturbed(model, optimizer, i, clears: bool = True):
    """Sharpness-aware: the first pass's gradient moves the weights to where the second is taken."""
    optimizer.zero_grad()
    loss_of(model).backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    steps = [0.05 * p.grad / (p.grad.norm() + 1e-9) for p in parameters]
    for p, step in zip(parameters, steps, strict=True):
        p.data.add_(step)
    if clears:
        optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    for p, step in zip(parameters, steps, strict=True):
        p.data.sub_(step)
    optimizer.step()
    return loss


def one_by_one(model, optimizer, i):
    """Each loss's gradient by itself, put together by hand, as against conflicts of tasks."""
    parts = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        parts.append([p.grad.clone() for p in model.parameters()])
    for p, *grads in zip(model.parameters(), *parts, strict=True):
        p.grad = sum(grads)
    optimizer.step()
    return loss


def made_by_hand(model, optimizer, i):
    """Of every other update the gradients come of no backward pass, as in evolution strategies."""
    if i % 2:
        return sound(model, optimizer, i)
    for p in model.parameters():
        p.grad = 0.01 * torch.randn_like(p)
    optimizer.step()
    return loss_of(model)


def test_adversarial_training_throws_the_gradients_of_its_attack_away() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(i: int) -> None:
        x, y = torch.randn(8, 4, requires_grad=True), torch.randint(2, (8,))
        F.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
        F.cross_entropy(model((x + 0.1 * x.grad.sign()).detach()), y).backward()
        optimizer.step()

    assert not EVENTS & watched(model, optimizer, step, 30)


def skipped_at_first(model, optimizer, i):
    """A scaler that has to find its scale."""
    for _ in range(10 if i == 0 else 0):
        optimizer.zero_grad()
        loss_of(model).backward()
    return sound(model, optimizer, i)


def with_a_remainder(model, optimizer, i):
    """An epoch's last micro-batches are too few for an update, and go into the next one."""
    if i % 16 == 15:
        loss_of(model).backward()
        return never_cleared(model, optimizer, i)
    return sound(model, optimizer, i)


SOUND = [sound, zeros, accumulated, as_a_discriminator, closure, perturbed, one_by_one, made_by_hand, skipped_at_first]
SOUND += [with_a_remainder]


@pytest.mark.parametrize("loop", SOUND)
def test_sound_orders_are_silent(loop) -> None:
    """Later, where not all updates are heard, too."""
    assert found(loop, n=200) == set()


def test_each_of_two_optimizers_is_heard_for_whole_updates() -> None:
    """Later in rows of twenty; no row begins between a backward pass and the step that it is for."""
    model = toy()
    both = halves(model)
    with Watch(model, both) as watch:
        heard, share = {id(o): [] for o in both}, {kind: 0.0 for kind in ("stale", "gone", "twice")}
        for update in range(1, 241):
            for optimizer in both:
                optimizer.zero_grad()
            loss_of(model).backward()
            for ear in watch.state.events.ears[::2]:
                heard[id(ear.t.optimizer)] += [update] if ear.some is not False else []
            for optimizer in both:
                optimizer.step()
            if update % 10 == 0:
                watch.check()
                share = {kind: max([share[kind], *watch.state.events.share(kind)]) for kind in share}
    assert set(share.values()) == {0.0}
    first, second = heard.values()
    assert first[:140] == [*range(1, 102), *range(121, 141), *range(181, 200)]
    assert second[:140] == [*range(1, 101), *range(120, 140), *range(180, 200)]


class ReturnsNone(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x, weight: x * weight)
    backward = staticmethod(lambda ctx, gradient: (gradient, None))


@pytest.mark.parametrize("kind", ["sparse", "none"])
def test_gradients_that_tell_nothing_disturb_nothing(kind: str) -> None:
    table = nn.Embedding(8, 2, sparse=kind == "sparse")
    gain = nn.Parameter(torch.ones(2))
    model = nn.ParameterList([*table.parameters(), *([gain] if kind == "none" else [])])
    optimizer = (torch.optim.SparseAdam if kind == "sparse" else torch.optim.AdamW)(model.parameters(), lr=0.1)

    def step(i: int) -> None:
        optimizer.zero_grad()
        rows = table(torch.arange(4))
        (ReturnsNone.apply(rows, gain) if kind == "none" else rows).square().sum().backward()
        optimizer.step()

    assert not (EVENTS | {"not_measured"}) & watched(model, optimizer, step, 30)


def never_cleared(model, optimizer, i):
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return loss


def cleared_now_and_then(model, optimizer, i, every: int = 2):
    """As if accumulated, and stepped each time."""
    if i % every == 0:
        optimizer.zero_grad()
    return never_cleared(model, optimizer, i)


def gone(model, optimizer, i, set_to_none: bool = True):
    loss = loss_of(model)
    loss.backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    return loss


def cleared_between(model, optimizer, i, set_to_none: bool = True):
    for _ in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = loss_of(model)
        (loss / 4).backward()
    optimizer.step()
    return loss


def clipped_between(model, optimizer, i, after_each: bool = True, max_norm: float = 0.01):
    """Without `after_each` once, after the last one, as is meant."""
    optimizer.zero_grad()
    for _ in range(4):
        loss = loss_of(model)
        (loss / 4).backward()
        if after_each:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss


def turned_between(model, optimizer, i):
    """As where gradients of several tasks are made to agree."""
    optimizer.zero_grad()
    for _ in range(2):
        loss = loss_of(model)
        (loss / 2).backward()
        for p in model.parameters():
            p.grad -= 0.5 * p.grad.mean()
    optimizer.step()
    return loss


def stepped_twice(model, optimizer, i):
    loss = sound(model, optimizer, i)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return loss


ILL = [(gone, "cleared_gradients", "gone when"), (cleared_between, "cleared_gradients", "the last one alone")]
ILL += [(partial(loop, set_to_none=False), *told) for loop, *told in ILL]
ILL += [(never_cleared, "stale_gradients", "still there"), (cleared_now_and_then, "stale_gradients", "still there")]
ILL += [
    (stepped_twice, "stale_gradients", "used already"),
    (partial(clipped_between, max_norm=1e-4), "cleared_gradients", "made smaller"),
]
ILL += [(partial(perturbed, clears=False), "stale_gradients", "at other weights")]


@pytest.mark.parametrize(("begins", "within"), [(0, 25), (35, 25), (145, 80)])
@pytest.mark.parametrize(("loop", "rule", "told"), ILL)
def test_each_mistake_is_named_whenever_it_begins(loop, rule: str, told: str, begins: int, within: int) -> None:
    (finding,) = seen(loop, begins + within - 5, begins)
    assert finding.rule == rule and told in finding.message and begins < finding.step <= begins + within
    assert finding.value > finding.limit


@pytest.mark.parametrize("kind", ["once", "never binds", "several tasks"])
def test_gradients_that_are_clipped_or_changed_as_is_meant(kind: str) -> None:
    loop = turned_between if kind == "several tasks" else partial(clipped_between, after_each=kind != "once")
    assert found(partial(loop, max_norm=1e6) if kind == "never binds" else loop, n=40) == set()


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.kind, self.size = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return [self.kind(hidden), self.size(hidden)]


@pytest.mark.parametrize(("way", "told"), [("cleared", {"cleared_gradients"}), ("added", set()), ("in turns", set())])
def test_a_task_whose_gradients_another_clears(way: str, told: set[str]) -> None:
    """Those of the shared part come again, and of the first head none is ever there at a step."""
    model = TwoTasks()
    (optimizer,) = adamw(model)

    def step(i: int) -> torch.Tensor:
        x = torch.randn(16, 8)
        optimizer.zero_grad()
        losses = [F.cross_entropy(scores, x[:, : scores.shape[1]].argmax(1)) for scores in model(x)]
        for loss in losses if way != "in turns" else [losses[i % 2 - 1]]:
            if way == "cleared":
                optimizer.zero_grad()
            loss.backward(retain_graph=True)
        optimizer.step()
        return losses[0].detach()

    assert watched(model, [optimizer], step) & {*EVENTS, "no_gradient"} == told


class Rivals(nn.Module):
    """A maker and a judge of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.judge = nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize(
    ("cleared", "told"),
    [("before the pass", set()), ("both before each", set()), ("after the step", {"stale_gradients"})],
)
def test_gradients_that_a_rival_left(cleared: str, told: set[str]) -> None:
    """The maker's backward pass goes through the judge."""
    model = Rivals()
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (model.maker, model.judge)]

    def step(i: int) -> None:
        for optimizer, other in (optimizers, optimizers[::-1]):
            made = model.maker(torch.randn(16, 4))
            if cleared != "after the step":
                optimizer.zero_grad()
            if cleared == "both before each":
                other.zero_grad()
            if optimizer is optimizers[0]:
                (-model.judge(made).mean()).backward()
            else:
                (model.judge(made.detach()).mean() - model.judge(torch.randn(16, 3)).mean()).backward()
            optimizer.step()
            if cleared == "after the step":
                optimizer.zero_grad()

    assert watched(model, optimizers, step) & EVENTS == told


@pytest.mark.parametrize("every", [1, 4])
def test_an_optimizer_that_steps_less_often_than_another(every: int) -> None:
    """Its gradients add up over the other one's steps: all of their passes are the same."""
    model = toy()
    fast, slow = halves(model)

    def step(i: int) -> torch.Tensor:
        fast.zero_grad()
        loss = loss_of(model)
        loss.backward()
        fast.step()
        if i % every == every - 1:
            slow.step()
            slow.zero_grad()
        return loss.detach()

    assert watched(model, [fast, slow], step) & EVENTS == set()


@pytest.mark.parametrize("clears", ["the model", "the optimizer"])
def test_what_only_the_loss_holds_is_not_cleared_by_the_model(clears: str) -> None:
    model = toy()
    centres = torch.nn.Parameter(torch.randn(VOCAB, VOCAB))
    optimizer = torch.optim.AdamW([*model.parameters(), centres], lr=1e-3)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(20):
            (model if clears == "the model" else optimizer).zero_grad()
            ids = torch.randint(VOCAB, (4, 16))
            (model(ids) @ centres - centres[ids]).square().mean().backward()
            optimizer.step()
    assert said(watch) == (["stale_gradients"] if clears == "the model" else [])
