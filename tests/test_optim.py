"""Who updates which tensor, how far, and at which share of the learning rate."""

import copy
import fnmatch
import math
import re

import pytest
import torch
from helpers import MECHANISMS, normal, perturb, refused, tiny
from test_kernels import Calls
from torch import nn

from moe_lab import build_model
from moe_lab.config import OptimizerConfig
from moe_lab.health import conventions
from moe_lab.optim import Muon, build_optimizers, groups_of, lr_share, muon, products
from moe_lab.optim.groups import split_parameters
from moe_lab.optim.muon import CONVENTIONS, lr_factor, orthogonalise

# DESIGN's table, by name. The first pattern that fits decides.
TABLE = [
    ("embedding.weight", "adamw_decayed"),
    ("lm_heads.*.weight", "adamw_decayed"),
    ("*norm.weight", "adamw"),
    ("*_depth.*", "adamw"),
    ("*.router.*", "adamw"),
    ("*.A_log", "adamw"),
    ("*.D", "adamw"),
    ("*.conv1d.*", "adamw"),
    ("*.bias", "adamw"),
    ("layers.*.seq_layer.[qkvo]_proj.weight", "muon"),
    ("layers.*.ffn.gate_proj*", "muon"),
    ("layers.*.ffn.up_proj*", "muon"),
    ("layers.*.ffn.down_proj*", "muon"),
    ("layers.*.seq_layer.*in_proj.weight", "muon"),
    ("layers.*.seq_layer.*x_proj.weight", "muon"),
    ("layers.*.seq_layer.*dt_proj.weight", "muon"),
    ("layers.*.seq_layer.*out_proj.weight", "muon"),
]


@pytest.fixture
def model():
    return build_model(tiny(**MECHANISMS["all"]))


def group_of_the_table(name: str) -> str:
    return next(group for pattern, group in TABLE if fnmatch.fnmatch(name, pattern))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_parameter_is_updated_once_by_the_group_of_the_table(mechanism: str, kind: str) -> None:
    model = build_model(tiny(**MECHANISMS[mechanism], moe_router_hidden=0 if mechanism == "moe" else 8))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimizerConfig(type=kind), max_lr=0.01)
    found = [(names[id(p)], group["name"]) for group in groups_of(optimizers) for p in group["params"]]
    expected = [(name, group_of_the_table(name)) for name in names.values()]
    if kind == "adamw":
        expected = [(name, group.replace("muon", "adamw_matrices")) for name, group in expected]
    assert sorted(found) == sorted(expected)


def test_the_table_is_used_up(model) -> None:
    """Each of its lines speaks of a tensor that exists, so that none of them is idle."""
    names = [name for name, _ in model.named_parameters()]
    assert not [pattern for pattern, _ in TABLE if not fnmatch.filter(names, pattern)]


def test_frozen_parameters_are_left_out(model) -> None:
    model.embedding.weight.requires_grad_(False)
    split = split_parameters(model)
    assert sum(len(group) for group in split.values()) == len(list(model.parameters())) - 1
    assert not any(p is model.embedding.weight for group in split.values() for p in group)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_only_matrices_embeddings_and_heads_decay(model, kind: str) -> None:
    """Without a gradient's push, one update leaves a tensor as it was, or shrinks it by lr · weight_decay."""
    perturb(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimizerConfig(type=kind, weight_decay=0.5, adamw_lr_ratio=0.3), max_lr=0.1)
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p)
        if p.ndim == 3 and "conv1d" not in name:
            p.grad[:, 0, 0] = 1e-30  # a slice without any gradient is an expert without tokens, which does not decay
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        group = group_of_the_table(name)
        lr = 0.1 if kind == "adamw" or group == "muon" else 0.03
        expected = before[name] * (1 - lr * 0.5) if group != "adamw" else before[name]
        torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-6, msg=name)


def test_options_and_learning_rates_arrive(model) -> None:
    options = {"momentum": 0.8, "nesterov": False, "ns_steps": 3, "weight_decay": 0.03, "adjust_lr": "match_rms_adamw"}
    config = OptimizerConfig(**options, adamw_lr_ratio=0.2, betas=(0.7, 0.8), eps=1e-5)
    matrices, adamw = build_optimizers(model, config, max_lr=0.05)
    wanted = options | {"lr": 0.05, "initial_lr": 0.05}
    assert {key: matrices.param_groups[0][key] for key in wanted} == wanted
    for group in adamw.param_groups:
        assert group["lr"] == group["initial_lr"] == pytest.approx(0.01)
        assert group["betas"] == (0.7, 0.8) and group["eps"] == 1e-5
    ratios = OptimizerConfig(adamw_lr_ratio=0.2, embedding_lr_ratio=0.7)
    lrs = {group["name"]: group["initial_lr"] for group in groups_of(build_optimizers(model, ratios, max_lr=0.05))}
    assert lrs == pytest.approx({"muon": 0.05, "adamw_decayed": 0.035, "adamw": 0.01})
    alone = build_optimizers(model, OptimizerConfig(type="adamw"), max_lr=0.05)
    assert [group["lr"] for group in groups_of(alone)] == [0.05] * 3


# ---- Muon (its peer is torch's own: tests/peers)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)], ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalised_singular_values_are_near_one(shape: tuple, scale: float) -> None:
    matrix = scale * normal(*shape)
    singular = torch.linalg.svdvals(orthogonalise(matrix, 5).float())
    assert singular.max() < 1.3
    if shape[0] != shape[1]:  # a square matrix may have a singular value too near zero for five iterations
        assert singular.min() > 0.6
    assert torch.linalg.svdvals(matrix / matrix.norm()).min() < 0.3  # which they were not before


@pytest.mark.parametrize("fast", [True, False], ids=["bfloat16", "float32"])
def test_a_batch_is_its_matrices_one_by_one(fast: bool, monkeypatch) -> None:
    """Of one shape or another, from stacks and alone, in batches that hold all of a shape or parts of a stack."""
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: fast)
    shapes = [(3, 20, 48), (5, 20, 48), (20, 48), (3, 48, 20), (48, 20), (20, 48), (70, 80), (2, 70, 80)]

    def updated(shapes: list[tuple], together: bool, limit: int) -> list[torch.Tensor]:
        monkeypatch.setattr(muon, "BATCH_BYTES", limit)
        params = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
        optimizers = [Muon(each, weight_decay=0.1) for each in ([params] if together else [[p] for p in params])]
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = normal(*p.shape, seed=100 * step + i)
            for optimizer in optimizers:
                optimizer.step()
        if together:
            sizes = [4 * sum(piece[0].numel() for piece in batch) for batch in optimizers[0].batches(params)]
            assert sum(sizes) == 4 * sum(p.numel() for p in params)
            assert max(sizes) <= max(limit, 4 * 70 * 80)  # bounded, but for a matrix that is larger by itself
            assert len(sizes) == (6 if limit > 1 << 20 else 17 if limit < 4 * 20 * 48 else len(sizes))
        return [p.detach() for p in params]

    alone = updated(shapes, together=False, limit=1)
    for limit in (1, 4 * 20 * 48 * 2, 1 << 21):
        for ours, wanted, shape in zip(updated(shapes, True, limit), alone, shapes, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-3 if fast else 1e-6, msg=str(shape))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_no_optimizer_waits_for_its_device(model, kind: str) -> None:
    optimizers = build_optimizers(model, OptimizerConfig(type=kind, weight_decay=0.1), max_lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with Calls() as calls:
        for optimizer in optimizers:
            optimizer.step()
    assert not calls.names & {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"} and calls.names


def test_fused_adamw_is_adamw(model) -> None:
    """One pass over the tensors; elsewhere than on CPUs, CUDA and MPS there is none."""
    (ours,) = build_optimizers(model, OptimizerConfig(type="adamw", weight_decay=0.1), max_lr=0.01)
    twin = copy.deepcopy(model)
    (peer,) = build_optimizers(twin, OptimizerConfig(type="adamw", weight_decay=0.1), max_lr=0.01)
    assert all(group["fused"] for group in ours.param_groups)
    for group in peer.param_groups:
        group["fused"] = False
    for step in range(4):
        for i, (p, q) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            p.grad = normal(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        ours.step()
        peer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    elsewhere = build_optimizers(model.to("meta"), OptimizerConfig(), max_lr=0.01)
    assert not elsewhere[1].param_groups[0]["fused"]


@pytest.mark.parametrize("device", ["cuda", "mps", "meta"])
def test_no_accelerator_is_taken_for_a_slow_cpu(device: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products.has_fast_bfloat16(torch.device(device))
    assert not products.has_fast_bfloat16(torch.device("cpu"))


@pytest.mark.parametrize(
    ("shape", "original", "match"), [((4, 16), 1.0, 0.8), ((64, 16), 2.0, 1.6), ((9, 9), 1.0, 0.6)]
)
def test_conventions_in_closed_form(shape: tuple, original: float, match: float) -> None:
    assert lr_factor(torch.Size(shape), "original") == pytest.approx(original)
    assert lr_factor(torch.Size((7, *shape)), "match_rms_adamw") == pytest.approx(match)


@pytest.mark.parametrize("shape", [(4, 16), (64, 16), (9, 9), (7, 48, 32)])
def test_health_knows_the_same_conventions(shape: tuple) -> None:
    """It may not import the optimizer. An orthogonal update has RMS 1 / sqrt(max(A, B))."""
    assert conventions.CONVENTIONS == CONVENTIONS
    for convention in CONVENTIONS:
        moved = lr_factor(torch.Size(shape), convention) / math.sqrt(max(shape[-2:]))
        assert conventions.muon_element_step(1.0, shape, convention) == pytest.approx(moved)


def test_what_muon_refuses() -> None:
    for shape in [(5,), (), (2, 3, 4, 5)]:
        message = f"^Muon takes matrices and stacks of matrices, got the shape {re.escape(str(shape))}$"
        with refused(ValueError, match=message):
            Muon([nn.Parameter(torch.zeros(shape))])
    with refused(ValueError, match=r"^adjust_lr='keller' is not one of original, match_rms_adamw$"):
        Muon([nn.Parameter(torch.zeros(2, 2))], adjust_lr="keller")


def test_muon_evaluates_a_closure_and_skips_what_has_no_gradient() -> None:
    p, idle = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([p, idle], lr=0.1, weight_decay=0.1)

    def closure():
        loss = (p * torch.arange(24.0).view(4, 6)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == sum(range(24))
    assert not p.eq(1).any() and idle.eq(1).all() and idle not in optimizer.state


# ---- schedule


@pytest.mark.parametrize(("n_steps", "warmup", "least"), [(100, 10, 0.1), (7, 1, 0.0), (50, 0, 0.3), (20, 19, 0.5)])
def test_the_schedule_in_closed_form(n_steps: int, warmup: int, least: float) -> None:
    shares = [lr_share(step, n_steps, warmup, least) for step in range(1, n_steps + 1)]
    for step, share in enumerate(shares, start=1):
        turn = math.pi * (step - warmup) / (n_steps - warmup)
        cosine = least + (1 - least) * 0.5 * (1 + math.cos(turn))
        assert share == pytest.approx(step / warmup if step <= warmup else cosine, abs=1e-12)
    if warmup:
        assert shares[0] == pytest.approx(1 / warmup)  # the first update does not run at the full LR
        assert shares[warmup - 1] == max(shares) == 1
    assert shares[-1] == pytest.approx(least)
    assert lr_share(n_steps + 1, n_steps, warmup, least) == lr_share(5000, n_steps, warmup, least) == least


def test_a_run_shorter_than_its_warmup_never_reaches_the_peak() -> None:
    assert [lr_share(step, 3, 10, 0.1) for step in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.3])
