"""Signals that are dead or faint, experts, ties, and what lies outside of the optimizer: each sickness with what looks like it."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy import VOCAB, Sparse, Toy, adamw, finding, said, toy, train, watched

from moe_lab.health import Watch
from moe_lab.health.during.outside import rough_positions

# ---- copies of the weights -------------------------------------------------------------------------------------------


def stochastic(x: torch.Tensor) -> torch.Tensor:
    bits = x.float().view(torch.int32)
    return ((bits + torch.randint_like(bits, 1 << 16)) & -65536).view(torch.float32).bfloat16()


COPIES = {  # how the copy e of a weight p is made anew after an update, its format, and what should be said
    "average": (lambda e, p, step: e.mul_(0.999).add_(p.to(e.dtype), alpha=0.001), torch.bfloat16, ["stuck_copy"]),
    "lerp": (lambda e, p, step: e.lerp_(p.to(e.dtype), 1e-4), torch.float16, ["stuck_copy"]),
    "in its place": (lambda e, p, step: 0.999 * e + 0.001 * p.to(e.dtype), torch.bfloat16, ["stuck_copy"]),
    "float32": (lambda e, p, step: e.mul_(0.999).add_(p, alpha=0.001), torch.float32, []),
    "stochastic": (lambda e, p, step: e.copy_(stochastic(e + 0.02 * (p - e.float()))), torch.bfloat16, []),
    "rounded": (lambda e, p, step: e.copy_(p), torch.bfloat16, []),
    "reference": (lambda e, p, step: e, torch.bfloat16, []),
    "now and then": (lambda e, p, step: e.copy_(p) if step % 25 == 0 else e, torch.bfloat16, []),
    "fast": (lambda e, p, step: e.lerp_(p.to(e.dtype), 0.5), torch.bfloat16, []),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_16_bit_average_of_the_weights_cannot_follow(kind: str) -> None:
    torch.manual_seed(0)
    anew, dtype, wanted = COPIES[kind]
    model = toy()
    (optimizer,) = adamw(model)
    shadow = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    # of the start, as near as the copies themselves, and what an earlier run of the same cell has left behind
    left = [value.clone().mul_(1) for value in shadow.values()]

    @torch.no_grad()
    def follow(step: int) -> None:
        for name, p in model.named_parameters():
            shadow[name] = anew(shadow[name], p, step)

    watch = watched(model, [optimizer], 70, before_step=follow)
    assert said(watch) == wanted and len(left) == len(shadow)


def test_an_average_that_is_part_of_the_model_is_seen_too() -> None:
    model = toy()
    (optimizer,) = adamw(model)
    model.average = copy.deepcopy(model).requires_grad_(False).bfloat16()

    @torch.no_grad()
    def follow(step: int) -> None:
        for e, p in zip(model.average.parameters(), list(model.parameters())[:8], strict=False):
            e.lerp_(p.bfloat16(), 0.001)

    watch = watched(model, [optimizer], 40, before_step=follow, expect_frozen=["average."])
    assert said(watch) == ["stuck_copy"]


STATISTICS = {  # what is done with an average's buffers, or the average, after an update, and what should be said
    "left": (lambda ema, model: None, ["stuck_copy"]),
    "copied": (lambda ema, model: [b.copy_(c) for b, c in zip(ema.buffers(), model.buffers(), strict=True)], []),
    "its own": (lambda ema, model: ema.train()(torch.randn(8, 4)), []),
    "copied once in a while": (lambda ema, model: torch.rand(()) < 0.2 and ema.load_state_dict(model.state_dict()), []),
    "another network": (lambda ema, model: [p.add_(0.01 * torch.randn_like(p)) for p in ema.parameters()], []),
}


def normed(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU(), nn.Linear(16, 1))


def said_of(model: nn.Module, n: int, after: Callable[[], object] = lambda: None) -> list[str]:
    """What is said of so many updates on a product of two inputs; `after` each of them."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with Watch(model, optimizer, quiet=True) as watch:
        for _ in range(n):
            x = torch.randn(32, 4)
            optimizer.zero_grad()
            (model(x) - x[:, :1] * x[:, 1:2]).square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                after()
    return said(watch)


@pytest.mark.parametrize("kind", STATISTICS)
def test_an_average_whose_batch_norms_keep_old_statistics_is_told(kind: str) -> None:
    buffers, wanted = STATISTICS[kind]
    model = normed()
    ema = copy.deepcopy(model).requires_grad_(False).eval()

    def follow() -> None:
        for p, q in zip(ema.parameters(), model.parameters(), strict=True):
            p.lerp_(q, 0.0 if kind in ("copied once in a while", "another network") else 0.05)
        buffers(ema, model)

    assert said_of(model, 60, follow) == wanted


def test_torchs_own_average_brings_its_statistics_along() -> None:
    model = normed()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    assert said_of(model, 60, lambda: ema.update_parameters(model)) == []


def trained_before(n: int) -> tuple[nn.Module, nn.Module]:
    """A model after some updates, and its average from their beginning on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    average = copy.deepcopy(model).requires_grad_(False)
    said_of(model, n, lambda: follow(average, model))
    return model, average


def follow(average: nn.Module, model: nn.Module) -> None:
    for p, q in zip(average.parameters(), model.parameters(), strict=True):
        p.lerp_(q, 0.005)


def anew(average: nn.Module) -> None:
    for p in average.parameters():
        p.copy_(torch.randn_like(p) * 0.3)


AVERAGES = {  # how an average that was kept so far is when the watch begins, what is done after each update, what is said
    "begins anew": (anew, follow, ["stuck_copy"]),
    "goes on": (lambda average: None, follow, []),
    "another model, which rests": (anew, lambda average, model: None, []),
    "another model, which wanders": (
        anew,
        lambda average, model: [p.add_(0.01 * torch.randn_like(p)) for p in average.parameters()],
        [],
    ),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_that_began_before_a_checkpoint_was_loaded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that goes on lies behind on the model's way, and were it farther away than this one."""
    begins, goes_on, wanted = AVERAGES[kind]
    if kind == "goes on":
        monkeypatch.setattr("moe_lab.health.during.rules_flow.FAR_AWAY", 0.01)
    model, average = trained_before(200)
    with torch.no_grad():
        begins(average)
    assert said_of(model, 60, lambda: goes_on(average, model)) == wanted


@pytest.mark.parametrize("kind", ["begins anew", "goes on"])
def test_a_target_network_within_the_model(kind: str) -> None:
    """It is a part of the model, as large as the one that trains: frozen on purpose, and asked where it began."""
    begins, goes_on, wanted = AVERAGES[kind]
    model, target = trained_before(200)
    both = nn.ModuleDict({"online": model, "target": target})
    both.forward = lambda x: both["online"](x)
    with torch.no_grad():
        begins(target)
    assert said_of(both, 60, lambda: goes_on(target, model)) == wanted


@pytest.mark.parametrize(("momentum", "told"), [(0.99, True), (0.1, False), (1.0, False), (None, False)])
def test_statistics_that_know_the_last_batch_alone(momentum: float | None, told: bool) -> None:
    assert said_of(normed(momentum), 11) == ["mode_mismatch"] * told


# ---- positions -------------------------------------------------------------------------------------------------------


def holding(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("table", tensor)
    return module


FREQUENCIES = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
PLACES = torch.arange(600.0)
TABLES = {
    "frequencies": (FREQUENCIES.bfloat16(), 512, True),
    "frequencies in float16": (FREQUENCIES.half(), 8192, True),
    "frequencies of few positions": (FREQUENCIES.bfloat16(), 64, False),
    "frequencies in float32": (FREQUENCIES, 8192, False),
    "places": (PLACES.bfloat16(), 512, True),
    "few places": (PLACES[:256].bfloat16(), 256, False),
    "cosines of rounded angles": (torch.outer(PLACES.bfloat16(), FREQUENCIES.bfloat16()).cos(), 512, True),
    "rounded cosines": (torch.outer(PLACES, FREQUENCIES).cos().bfloat16(), 512, False),
    "distances": (-0.5 * (PLACES.bfloat16() - PLACES[:8, None].bfloat16()).T, 512, True),
    "noise": (torch.randn(600, generator=torch.Generator().manual_seed(0)).bfloat16(), 512, False),
    "a mask": (torch.full((64, 64), -torch.inf).triu(1).bfloat16(), 64, False),
    "ones": (torch.ones(600, 8).bfloat16(), 512, False),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_positions_in_16_bits(kind: str) -> None:
    table, longest, is_rough = TABLES[kind]
    assert bool(rough_positions(holding(table), longest)) == is_rough


def test_a_watch_knows_how_long_the_sequences_are() -> None:
    for longest, wanted in ((16, []), (1024, ["rough_positions"])):
        model = toy()
        model.rotary = holding(FREQUENCIES.bfloat16())
        (optimizer,) = adamw(model)
        with Watch(model, optimizer) as watch:
            for _ in range(11):
                optimizer.zero_grad()
                ids = torch.randint(VOCAB, (1, longest))
                F.cross_entropy(model(ids).flatten(0, 1), ((7 * ids + 3) % VOCAB).flatten()).backward()
                optimizer.step()
        assert said(watch) == wanted


@pytest.mark.parametrize(
    ("weights", "table"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_rounded_cosines_are_told_beside_exact_weights_alone(weights: str, table: str) -> None:
    model = toy()
    model.rotary = holding(torch.outer(PLACES, FREQUENCIES).cos())
    model.to(getattr(torch, weights)).rotary.to(getattr(torch, table))
    told = [f for f in watched(model, adamw(model), 11).findings if f.rule == "rough_positions"]
    assert [(f.severity, f.where) for f in told] == ([("info", "rotary.table")] if weights != table else [])


# ---- terms of the loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxiliary", ["balance", "constant", "detached"])
def test_a_term_that_never_varies(auxiliary: str) -> None:
    model = toy(kind=Sparse, auxiliary=auxiliary)
    watch = watched(model, adamw(model), 60)
    assert said(watch) == (["constant_term"] if auxiliary == "constant" else [])
    if auxiliary == "constant":
        assert finding(watch, "constant_term").where == "mixture.term"


def test_a_kept_number_that_never_varies_is_no_term() -> None:
    model = toy()
    model.share = torch.tensor(0.5)
    assert said(watched(model, adamw(model), 60)) == []


class Output(nn.Module):
    """Gives its scalars beside the logits: one that is normalised away, a learned temperature, and a number."""

    def __init__(self, has_constant: bool):
        super().__init__()
        self.inner, self.has_constant, self.heat = toy(), has_constant, nn.Parameter(torch.tensor(0.0))

    def forward(self, ids):
        logits = self.inner(ids) * self.heat.exp()
        return {"logits": logits, "entropy": logits.softmax(-1).sum(-1).mean(), "heat": self.heat.exp()}

    def __call__(self, ids):
        return super().__call__(ids)


@pytest.mark.parametrize("has_constant", [False, True])
def test_a_term_among_the_outputs(has_constant: bool) -> None:
    model = Output(has_constant)
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        for step in range(60):
            optimizer.zero_grad()
            ids = torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(step))
            out = model(ids) if has_constant else {"logits": model.inner(ids) * model.heat.exp()}
            F.cross_entropy(out["logits"].flatten(0, 1), ((7 * ids + 3) % VOCAB).flatten()).backward()
            optimizer.step()
    assert [f.where for f in watch.findings if f.rule == "constant_term"] == ["output.entropy"] * has_constant


# ---- gradients, ties, start values -----------------------------------------------------------------------------------


class Whispering(Toy):
    """A branch times `volume`, with a bias that the norm takes out again: its gradient is rounding alone."""

    def __init__(self, volume: float):
        super().__init__()
        self.branch, self.volume = nn.Linear(16, 16), volume
        self.bias = nn.Parameter(torch.full((1,), 64.0))  # the norm takes it out, but for rounding
        self.even = nn.LayerNorm(16)

    def forward(self, ids):
        x = self.even(self.embedding(ids) + self.bias)
        x = x + self.volume * self.branch(x)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


@pytest.mark.parametrize(("volume", "wanted"), [(1.0, []), (1e-3, []), (1e-9, ["faint_gradient"])])
def test_a_faint_gradient(volume: float, wanted: list[str]) -> None:
    model = toy(kind=Whispering, volume=volume)
    watch = watched(model, adamw(model), 25)
    assert said(watch) == wanted
    assert not wanted or finding(watch, "faint_gradient").where == "branch.weight"


def tiny_gpt2(**options):
    torch.manual_seed(0)
    config = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config | {"eos_token_id": 0} | options))


@pytest.mark.parametrize("case", ["tied", "untied by config", "fresh", "same values", "tie broken later"])
def test_ties(case: str) -> None:
    model = tiny_gpt2(tie_word_embeddings=case not in ("untied by config", "same values"))
    head, table = model.lm_head, model.transformer.wte
    if case == "fresh":
        head.weight = nn.Parameter(torch.randn_like(head.weight))
    if case == "same values":
        head.weight = nn.Parameter(table.weight.detach().clone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    watch = Watch(model, optimizer)
    if case == "tie broken later":
        head.weight = nn.Parameter(table.weight.detach().clone())
        optimizer.add_param_group({"params": [head.weight]})
        watch.check()
    assert ("broken_tie" in said(watch)) == (case not in ("tied", "untied by config"))


def test_looking_at_choices_changes_nothing() -> None:
    ends = []
    for watching in (False, True):
        model = toy(kind=Sparse, around=False, auxiliary="balance")
        optimizers = adamw(model)
        watch = Watch(model, optimizers) if watching else None
        train(watch, model, optimizers, 25)
        ends.append([torch.get_rng_state(), *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    watch.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class Reads(nn.Module):
    """Puts a place of its own before what it is given, and reads one place out; `beside`: what else takes the batch."""

    def __init__(self, place: int, beside: str = "") -> None:
        super().__init__()
        self.patches, self.own, self.place = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 1, 8)), place
        self.beside = {"": None, "numbers": nn.Linear(6, 8), "tokens": nn.Embedding(5, 8)}[beside]
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([self.own.expand(len(x), -1, -1), self.patches(x)], 1)[:, self.place]
        if self.beside is not None:
            whole = whole + (self.beside(ids) if isinstance(self.beside, nn.Embedding) else self.beside(x).mean(1))
        return self.head(whole)


@pytest.mark.parametrize(
    ("place", "beside", "severity"),
    [(0, "", "warning"), (1, "", "info"), (0, "numbers", "info"), (0, "tokens", "info")],
)
def test_a_model_that_says_the_same_whatever_it_is_given(place: int, beside: str, severity: str) -> None:
    torch.manual_seed(0)
    model = Reads(place, beside)
    (optimizer,) = adamw(model, lr=1e-3)
    with Watch(model, optimizer) as watch:
        for _ in range(30):
            x, ids = torch.randn(16, 4, 6), torch.randint(5, (16,))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x, ids), (x[:, 0, 0] > 0).long())
            loss.backward()
            watch.observe(loss=loss)
            optimizer.step()
    assert [f.severity for f in watch.findings if f.rule == "no_gradient"] == [severity]
