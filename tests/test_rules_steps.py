"""The step that arrives: stacks matrix by matrix, factors by use, sizes, decay; each sickness beside what only looks like it."""

import optimi
import pytest
import torch
import torch.nn.functional as F
from pytorch_optimizer import ADOPT
from stand_ins import DionMuon, JordanMuon, MoonlightMuon, NorMuon, original_factor
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from toy import finding, said, toy, train, watched

from moe_lab.health import Watch
from moe_lab.health.during.intended import keeps_lost_bits
from moe_lab.health.during.steps import law_of
from moe_lab.health.torch_private import fan_ins
from moe_lab.optim.muon import orthogonalise

STEPS = {"mixed_stack", "turned_factor", "starved_steps", "lost_decay"}
VOCAB = 64


class Experts(nn.Module):
    """`up` (E, in, out) and `down` (E, out, in): x @ W, all experts take every token."""

    def __init__(self, einsum: bool = False):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 48) / 4), nn.Parameter(torch.randn(4, 48, 16) / 7)
        self.einsum = einsum

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.einsum:
            h = torch.einsum("btd,edf->btef", x, self.up)
            return self.head(x + torch.einsum("btef,efd->btd", F.gelu(h), self.down))
        stream = x.flatten(0, 1).expand(4, -1, -1)
        y = torch.bmm(F.gelu(torch.bmm(stream, self.up)), self.down).sum(0)
        return self.head(x + y.view_as(x))


class Flattened(JordanMuon):
    """A stack is one matrix to it."""

    def update(self, p: Tensor, group: dict) -> Tensor:
        return orthogonalise(p.grad.flatten(1), steps=5).view_as(p).to(p.dtype)


class AcrossExperts(JordanMuon):
    def update(self, p: Tensor, group: dict) -> Tensor:
        return orthogonalise(p.grad.transpose(0, 1), steps=5).transpose(0, 1).to(p.dtype)


class StacksByUse(JordanMuon):
    """Stacks are stored (E, in, out), matrices (out, in)."""

    def update(self, p: Tensor, group: dict) -> Tensor:
        update = super().update(p, group)
        return update * original_factor(p.mT) / original_factor(p) if p.ndim == 3 else update


class ByUse(JordanMuon):
    """For weights stored (in, out)."""

    def update(self, p: Tensor, group: dict) -> Tensor:
        return super().update(p, group) * original_factor(p.mT) / original_factor(p)


def with_experts(kind: type, einsum: bool = False) -> set[str]:
    torch.manual_seed(0)
    model = Experts(einsum)
    rest = [*model.embedding.parameters(), *model.head.parameters()]
    return STEPS & set(said(watched(model, [kind([model.up, model.down], lr=0.02), AdamW(rest, lr=0.01)], 12)))


def with_linear_layers(kind: type, width: int, n: int) -> set[str]:
    model = toy(width=width)
    matrices = [model.up.weight, model.down.weight]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return STEPS & set(said(watched(model, [kind(matrices, lr=0.02), AdamW(rest, lr=0.01)], n)))


def test_stacks_are_stepped_matrix_by_matrix() -> None:
    assert "mixed_stack" in with_experts(AcrossExperts) & with_experts(Flattened)
    for kind in (ByUse, StacksByUse, NorMuon):
        assert with_experts(kind) == set()


def test_a_convolution_is_flattened_on_purpose() -> None:
    model = nn.Sequential(nn.Embedding(VOCAB, 16), nn.Flatten(1), nn.Unflatten(1, (16, 16)), nn.Conv1d(16, 16, 3))
    optimizer = Flattened([model[3].weight], lr=0.02)
    with Watch(model, [optimizer, SGD([model[0].weight, model[3].bias], lr=0.1)]) as watch:
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randint(VOCAB, (8, 16))).square().mean().backward()
            optimizer.step()
    assert not STEPS & set(said(watch))


@pytest.mark.parametrize("einsum", [False, True])
def test_a_factor_that_takes_inputs_for_outputs(einsum: bool) -> None:
    assert with_experts(JordanMuon, einsum) == {"turned_factor"}
    assert with_experts(DionMuon, einsum) == {"turned_factor"}
    assert with_experts(ByUse, einsum) == set()
    assert with_experts(NorMuon, einsum) == set()  # its size does not depend on the shape's orientation


def test_linear_layers_are_stored_as_the_factor_has_it() -> None:
    assert with_linear_layers(JordanMuon, 16, 12) == with_linear_layers(StacksByUse, 16, 12) == set()
    assert with_linear_layers(ByUse, 16, 12) == {"turned_factor"}


def test_which_dimension_a_product_sums_over() -> None:
    w, v, x = (nn.Parameter(torch.randn(shape)) for shape in ((4, 6), (6, 4), (2, 5, 4)))
    stack = nn.Parameter(torch.randn(3, 4, 6))
    for output, leaf, expected in (
        (x @ w, w, -2),
        (x @ v.T, v, -1),
        (F.linear(x, v), v, -1),
        (w.T @ x.mT, w, -2),
        (torch.einsum("bsd,df->bsf", x, w), w, -2),
        (torch.einsum("bsd,fd->bsf", x, v), v, -1),
        (torch.einsum("bsd,edf->bsef", x, stack), stack, -2),
        (x @ stack[1], stack, -2),
        (torch.bmm(torch.randn(3, 2, 6), stack.mT), stack, -1),
    ):
        assert fan_ins(output.sum())[id(leaf)] == expected


def test_laws_are_of_orthogonal_steps_alone() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    made = AdamW([p]), SGD([p]), optimi.Lion([p], lr=0.1), MoonlightMuon(0.1, 0.0, [p], []), ADOPT([p])
    for optimizer in made:  # the last one's first step moves nothing
        assert law_of(optimizer, optimizer.param_groups[0]) is None
    jordan, torchs = JordanMuon([p]), torch.optim.Muon([p], adjust_lr_fn="match_rms_adamw")
    assert law_of(jordan, jordan.param_groups[0]).tall[2] == pytest.approx(2, rel=0.1)
    assert law_of(torchs, torchs.param_groups[0]).tall[2] == pytest.approx(1, rel=0.1)


# ---- how large -------------------------------------------------------------------------------------------------------


def with_gradients(change, make=lambda p: SGD(p, lr=0.1), n: int = 40) -> Watch:
    model = toy()
    return watched(model, [make(list(model.parameters()))], n, before_step=lambda step: change(model))


def scaled(model, by: float, clip: float | None = None) -> None:
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    for p in model.parameters():
        p.grad *= by


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1), lambda p: AdamW(p, lr=0.01, weight_decay=0.0)])
def test_clipping_before_unscaling(make) -> None:
    watch = with_gradients(lambda model: scaled(model, 2.0**-16, clip=0.1), make)
    (found,) = [f for f in watch.findings if f.where == "gradients"]
    assert found.rule == "starved_steps" and found.step <= 20 and "unscale_" in found.advice
    assert found.value == pytest.approx(0.1 * 2**-16, rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: scaled(model, 1.0, clip=0.05),  # a clip that always binds
        lambda model: scaled(model, 2.0**-16),  # small gradients, which differ
        lambda model: [p.grad.fill_(1e-6) for p in model.parameters()],  # the very same: a training that has arrived
    ],
)
def test_sound_clips_and_small_gradients(change) -> None:
    assert not STEPS & set(said(with_gradients(change)))


def test_adam_below_its_eps() -> None:
    def adam(eps: float):
        return lambda params: AdamW(params, lr=0.01, weight_decay=0.0, eps=eps)

    tiny = with_gradients(lambda model: scaled(model, 2.0**-32), adam(1e-8))
    assert "below Adam's eps" in finding(tiny, "starved_steps").message
    assert "below Adam's eps" in finding(with_gradients(lambda model: None, adam(0.1)), "starved_steps").message
    for watch in (
        with_gradients(lambda model: scaled(model, 2.0**-32), adam(1e-20)),
        with_gradients(lambda model: scaled(model, 2.0**-10), adam(1e-8)),
        with_gradients(lambda model: scaled(model, 2.0**10), adam(0.1)),
        with_gradients(lambda model: None, lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1.0)),  # not Adam's eps
    ):
        assert not STEPS & set(said(watch))


class ClippedAfter(JordanMuon):
    """All orthogonalised updates together are clipped to a norm of 0.1."""

    def update(self, p: Tensor, group: dict) -> Tensor:
        update = super().update(p, group)
        return update * 0.1 / update.norm()


def test_an_orthogonal_step_that_a_clip_has_shrunk() -> None:
    assert with_linear_layers(ClippedAfter, 32, 20) == {"starved_steps"}
    assert with_linear_layers(JordanMuon, 32, 20) == set()


# ---- decay -----------------------------------------------------------------------------------------------------------


class DecayApart(AdamW):
    """Rounds its update stochastically, by a generator of its own; decay is a product in bf16 before it, or part of it."""

    def __init__(self, params, apart: bool, **options):
        super().__init__(params, **options)
        self.stochastic_rounding, self.apart, self.g = True, apart, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            decay = 1 - group["lr"] * group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                if self.apart:
                    p.mul_(decay)
                x = p.float() * (1.0 if self.apart else decay) - group["lr"] * p.grad.float().sign()
                if p.dtype == torch.bfloat16:
                    noise = torch.randint(1 << 16, x.shape, generator=self.g, dtype=torch.int32)
                    x = ((x.view(torch.int32) + noise) & -65536).view(torch.float32)
                p.copy_(x)


def decayed(make, dtype=torch.bfloat16) -> set[str]:
    model = toy(dtype=dtype)
    return {"lost_decay", "lost_updates"} & set(said(watched(model, [make(model.parameters())], 22)))


def test_decay_that_16_bits_round_away() -> None:
    options = {"lr": 2e-3, "weight_decay": 0.1}
    assert decayed(lambda p: DecayApart(p, apart=True, **options)) == {"lost_decay"}
    assert not decayed(lambda p: DecayApart(p, apart=False, **options))
    assert not decayed(lambda p: DecayApart(p, apart=True, **options), torch.float32)
    assert not decayed(lambda p: DecayApart(p, apart=True, lr=2e-3, weight_decay=4.0))  # above half a unit
    assert not decayed(lambda p: DecayApart(p, apart=True, lr=2e-3, weight_decay=0.0))


# ---- masters ---------------------------------------------------------------------------------------------------------


class WithCopies(SGD):
    """Float32 copies in a nested attribute whose name tells nothing."""

    def __init__(self, params, lr: float, of: float = 1.0):
        super().__init__(params, lr=lr)
        self.things = [[of * p.detach().float() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for p, master in zip(self.param_groups[0]["params"], self.things[0], strict=True):
            master.sub_(p.grad.float(), alpha=self.param_groups[0]["lr"])
            p.copy_(master)


def test_masters_in_an_attribute_are_seen_by_what_they_hold() -> None:
    model = toy(dtype=torch.bfloat16)
    optimizer = WithCopies(model.parameters(), lr=1e-6)
    assert keeps_lost_bits(optimizer)
    watch = Watch(model, optimizer)
    train(watch, model, [optimizer], 60)
    watch.check()
    assert "bf16_parameters" not in said(watch)
    assert not keeps_lost_bits(WithCopies(toy(dtype=torch.bfloat16).parameters(), lr=1e-6, of=-1.0))


def test_every_kind_that_loses_updates_is_named_with_the_first() -> None:
    """Gains of 1 prove it; weights that were meant to move by less than half a unit are named with them, after the vectors."""
    model = toy(dtype=torch.bfloat16)
    with torch.no_grad():
        model.head.weight.add_(4.0)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "lr": 1e-5}, {"params": vectors, "lr": 4e-4}]
    watch = watched(model, [AdamW(groups, weight_decay=0.0)], 20)
    never, found = (f for f in watch.findings if f.rule == "lost_updates")
    assert never.where == "head.weight" and "no step that Adam can make" in never.message
    assert found.severity == "error" and found.step == 20  # not one element moved: half a unit is proof
    assert found.message.index("norm.weight 0%") < found.message.index("embedding.weight")
    assert "arrived in 5 of 7 kinds" in found.message  # the head, too: of itself, a hundredth of a unit proves nothing
