"""bf16 parameters that keep their small updates: against fp32, closed forms and the definition of rounding."""

import copy
import io

import pytest
import torch
from checks.remedies import REMEDIES
from helpers import MECHANISMS, normal, refused, tiny
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from moe_lab import build_model
from moe_lab.config import OptimizerConfig
from moe_lab.health.during.intended import keeps_lost_bits
from moe_lab.optim import Muon, build_optimizers, groups_of
from moe_lab.optim.rounding import MODES, Rounded, stochastic_round

EVERYTHING = tiny(**MECHANISMS["all"])
MAX_LR = 2e-3


def weight(*values: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def exact(optimizer: Rounded, p: Tensor) -> Tensor:
    """Weight and compensation, summed in double precision."""
    return p.detach().double() + optimizer.state[p]["compensation"].double()


def set_gradients(model: nn.Module, seed: int) -> None:
    """The same bf16 values for every model of the same shapes; one parameter has none, one expert received no token."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=generator).bfloat16()
        if p.ndim == 3 and "proj" in name:
            grad[1] = 0
        p.grad = None if name == "final_norm.weight" else grad.to(p.dtype)


def run(model: nn.Module, optimizers: list, steps: range) -> None:
    """Updates under an LR that changes."""
    for step in steps:
        set_gradients(model, step)
        for group in groups_of(optimizers):
            group["lr"] = group["initial_lr"] / (1 + step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def remedied(name: str, kind: str = "muon"):
    model = build_model(EVERYTHING)
    return model, REMEDIES[name](model, OptimizerConfig(type=kind), MAX_LR)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


# ---- masters


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_masters_are_an_fp32_run_and_the_weights_its_cast(kind: str) -> None:
    reference = build_model(EVERYTHING)
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    run(reference, build_optimizers(reference, OptimizerConfig(type=kind), MAX_LR), range(6))
    model, optimizers = remedied("masters", kind)
    run(model, optimizers, range(6))
    masters = {id(p): state["master"] for o in optimizers for p, state in o.state.items()}
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(masters[id(p)], q), name
        assert torch.equal(p, q.bfloat16()), name
        assert torch.equal(q, start[name]) == (name == "final_norm.weight"), name


def test_masters_start_from_the_values_before_the_cast() -> None:
    p = weight(1.001)
    optimizer = Rounded(SGD([p], lr=1.0), "masters")
    assert p.dtype == torch.bfloat16 and p.item() == 1.0
    assert optimizer.state[p]["master"].item() == pytest.approx(1.001, abs=1e-7)
    q = weight(1.001, dtype=torch.bfloat16)
    assert Rounded(SGD([q], lr=1.0), "masters").state[q]["master"].item() == 1.0


# ---- Kahan


def test_kahan_is_exact_where_its_bits_suffice_and_plain_bf16_stands_still() -> None:
    plain, p = weight(1.0, dtype=torch.bfloat16), weight(1.0)
    optimizer = Rounded(SGD([p], lr=2**-14), "kahan")
    for descending in (SGD([plain], lr=2**-14), optimizer):
        for _ in range(100):
            plain.grad, p.grad = torch.ones_like(plain), torch.ones_like(p)
            descending.step()
    assert plain.item() == 1.0
    assert exact(optimizer, p).item() == 1 - 100 * 2**-14
    assert p.item() == 0.9921875  # the bf16 value nearest to 0.99390


@pytest.mark.parametrize(("update", "arrives"), [(2**-16, True), (2**-18, False)])
def test_kahan_too_has_a_smallest_update(update: float, arrives: bool) -> None:
    p = weight(1 + 1.5 * 2**-9)
    optimizer = Rounded(SGD([p], lr=update), "kahan")
    p.grad = -torch.ones_like(p)
    optimizer.step()
    assert exact(optimizer, p).item() == 1 + 1.5 * 2**-9 + update * arrives


# ---- stochastic rounding


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 values around each normal x, by arithmetic in double precision: 8 significant bits."""
    exponent = torch.frexp(x.double()).exponent
    ulp = torch.ldexp(torch.ones(x.shape, dtype=torch.float64), exponent - 8)
    return (x.double() / ulp).floor() * ulp, (x.double() / ulp).ceil() * ulp


def spread_values(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, generator=generator) * 10 ** torch.empty(n).uniform_(-8, 8, generator=generator)


def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_both_occur() -> None:
    x = spread_values(10_000)
    below, above = neighbours(x)
    y = stochastic_round(x, torch.Generator().manual_seed(0))
    assert y.dtype == torch.bfloat16 and y.shape == x.shape
    up, down = y.double() == above, y.double() == below
    assert (up | down).all()
    assert 0.45 < up.double().mean() < 0.55 and 0.45 < down.double().mean() < 0.55


def test_stochastic_rounding_is_unbiased() -> None:
    x, n = spread_values(64), 20_000
    below, above = neighbours(x)
    share = (x.double() - below) / (above - below)
    y = stochastic_round(x.expand(n, -1).clone(), torch.Generator().manual_seed(0)).double()
    error = (y.mean(0) - x.double()) / (above - below)  # in ULP
    assert (error.abs() <= 5 * (share * (1 - share) / n).sqrt()).all()


def test_exact_values_stay_exact_and_nothing_is_made_finite() -> None:
    special = torch.tensor([0.0, -0.0, 1e-40, float("inf"), -float("inf")])
    values = torch.cat([spread_values(1000).bfloat16().float(), special])
    values[-3] = values[-3].bfloat16().float()  # a subnormal
    rounded = stochastic_round(values)
    assert torch.equal(rounded.float().view(torch.int32), values.view(torch.int32))
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert stochastic_round(nans).isnan().all()


# ---- a proper optimizer, in every mode


@pytest.mark.parametrize("mode", MODES)
def test_a_run_continues_bit_equally_from_a_file_and_in_a_copy(mode: str) -> None:
    model, optimizers = remedied(mode)
    run(model, optimizers, range(2))
    twin, others = copy.deepcopy((model, optimizers))
    file = io.BytesIO()
    torch.save([model.state_dict(), *(o.state_dict() for o in optimizers)], file)
    torch.manual_seed(5)
    run(model, optimizers, range(2, 4))

    again, loaded = remedied(mode)
    run(again, loaded, range(7, 9))  # a life before: everything must be replaced
    again, loaded = copy.deepcopy((again, loaded))  # which has to be as good as the one that was built
    file.seek(0)
    weights, *states = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    for optimizer, state in zip(loaded, states, strict=True):
        optimizer.load_state_dict(state)
    assert_same(twin, again)  # what became of the original is not the copy's business
    for follower, its_optimizers in ((again, loaded), (twin, others)):
        torch.manual_seed(5)
        run(follower, its_optimizers, range(2, 4))
        assert_same(follower, model)
        for ours, theirs in zip(its_optimizers, optimizers, strict=True):
            for p, q in zip(ours.state.values(), theirs.state.values(), strict=True):
                assert p.keys() == q.keys()
                assert all(torch.equal(p[k], q[k]) and p[k].dtype == q[k].dtype for k in p)


@pytest.mark.parametrize("mode", MODES)
def test_an_expert_without_tokens_is_left_alone(mode: str) -> None:
    start = normal(3, 4, 5)
    # just below the middle of two bf16 values: the compensation rounds to the middle, and their sum would round up
    start[1, 0, 0] = 1 + 2**-7 + 2**-8 - 2**-20
    p = nn.Parameter(start.clone())
    optimizer = Rounded(Muon([p], lr=0.02, weight_decay=0.1), mode)
    weights, kept = p.detach().clone(), copy.deepcopy(dict(optimizer.state[p]))
    for _ in range(3):
        p.grad = torch.ones_like(p)
        p.grad[1] = 0
        optimizer.step()
    assert torch.equal(p[1], weights[1])
    assert all(torch.equal(optimizer.state[p][key][1], value[1]) for key, value in kept.items())
    assert (p[[0, 2]] != weights[[0, 2]]).any(dim=(1, 2)).all()


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_no_change_and_hooks_see_both_sides_of_a_step(mode: str) -> None:
    p, idle = weight(1.0, 2.0), weight(3.0)
    optimizer = Rounded(AdamW([{"params": [p]}, {"params": [idle], "weight_decay": 0.5}], lr=0.1), mode)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].tolist()))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["params"][0].tolist()))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(seen) == 2 and seen[0] == [1.0, 2.0] and seen[1] == p.tolist() != seen[0]
    assert idle.item() == 3.0 and "exp_avg" not in optimizer.state[idle]
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["exp_avg"].dtype == torch.float32
    optimizer.zero_grad()
    assert p.grad is None
    assert keeps_lost_bits(optimizer)  # a Watch can tell
    assert mode == "masters" or sum(work.numel() for work in optimizer.work.values()) == 0


@pytest.mark.parametrize("mode", MODES)
def test_groups_closures_and_schedulers(mode: str) -> None:
    p, later = weight(1.0), weight(1.0)
    optimizer = Rounded(SGD([p], lr=1.0), mode)
    optimizer.add_param_group({"params": [later], "lr": 0.5})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum() + later.sum()
        loss.backward()
        return loss

    for expected_loss in (2.0, 0.5):
        assert optimizer.step(closure).item() == expected_loss
        scheduler.step()
    assert (p.item(), later.item()) == (1 - 1 - 0.5, 1 - 0.5 - 0.25)


def test_gradients_made_before_the_cast_are_cast_too() -> None:
    p = weight(1.0)
    p.grad = torch.ones_like(p)
    optimizer = Rounded(SGD([p], lr=0.5), "kahan")
    optimizer.step()
    assert p.grad.dtype == torch.bfloat16 and p.item() == 0.5


def stepped() -> AdamW:
    p = weight(1.0)
    p.grad = torch.ones_like(p)
    optimizer = AdamW([p])
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("inner", "mode", "message"),
    [
        (lambda: SGD([weight(1.0)], lr=1.0), "fp32", "mode='fp32' is not one of masters, kahan, stochastic"),
        (stepped, "kahan", "stepped already; wrap it in Rounded before its first step"),
        (lambda: SGD([weight(1.0, dtype=torch.float16)], lr=1.0), "kahan", "got torch.float16"),
    ],
)
def test_wrong_use_is_a_line(inner, mode: str, message: str) -> None:
    with refused(ValueError, match=message):
        Rounded(inner(), mode)


def test_a_state_of_another_kind_is_refused() -> None:
    kahan, masters = (Rounded(SGD([weight(1.0)], lr=1.0), mode) for mode in ("kahan", "masters"))
    with pytest.raises(ValueError, match="the state has rounding=masters, this optimizer 'kahan'"):
        kahan.load_state_dict(masters.state_dict())
    with pytest.raises(ValueError, match="the state has rounding=None, this optimizer 'masters'"):
        masters.load_state_dict(SGD([weight(1.0)], lr=1.0).state_dict())
