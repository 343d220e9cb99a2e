"""The model as a whole: its start values, its losses, its gradients, and the ways in which it may be asked to compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import MECHANISMS, assert_agreement, gradients, normal, perturb, random_ids, tiny
from torch import Tensor, nn

from moe_lab import build_model
from moe_lab.model import LanguageModel, transformer
from moe_lab.model.layers import RMSNorm, dropout


def everything(**changes):
    return tiny(**{**MECHANISMS["all"], **changes})


# ---- start values


def test_init_weights_reaches_every_parameter() -> None:
    model = LanguageModel(everything())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    model.init_weights()
    assert not [name for name, p in model.named_parameters() if p.isnan().any()]


def test_start_values_depend_on_the_seed_alone_and_spare_the_callers_randomness() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = build_model(everything(), seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    second, other = build_model(everything(), seed=1).state_dict(), build_model(everything(), seed=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    random = [name for name in first if "norm" not in name and not name.endswith(("A_log", ".D"))]
    assert not [name for name in random if torch.equal(first[name], other[name])]


def test_start_values_of_the_matrices() -> None:
    model = build_model(everything(d_model=64, n_heads=8, d_ff=64, d_ff_expert=64, init_std=0.05))
    for name, p in model.state_dict().items():
        if "norm" in name:
            assert p.eq(1).all(), name
        elif "dt_proj" not in name and "conv1d" not in name and not name.endswith(("A_log", ".D")) and p.numel() > 1000:
            assert p.std() == pytest.approx(0.05, rel=0.15), name
            assert abs(p.mean()) < 0.05 * 5 / math.sqrt(p.numel()), name


@torch.no_grad()
def test_blocks_that_start_at_zero_add_nothing() -> None:
    model, drawn = (build_model(everything(zero_init_output=zero), seed=1).eval() for zero in (True, False))
    ids = torch.arange(24).view(2, 12)
    expected = model.lm_heads[0](model.final_norm(model.embedding(ids)))
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(drawn(ids).logits, expected)
    still = dict(drawn.named_parameters())
    zeroed = {n for n, p in model.named_parameters() if not torch.equal(p, still[n])}
    assert zeroed == {n for n in still if n.split(".weight")[0].split(".")[-1] in ("o_proj", "out_proj", "down_proj")}


@pytest.mark.parametrize("init_std", [0.02, 0.3])
def test_the_loss_at_step_0(init_std: float) -> None:
    """ln V + var(logits) / 2, and var(logits) is d_model · init_std², since the hidden state is normalised."""
    config = everything(init_std=init_std)
    model, ids = build_model(config).eval(), random_ids(16, 49)
    logits = model(ids[:, :-1]).logits
    terms = model.losses(ids)
    loss = terms["next_token"].item() * 1.5  # its weight is 1 of 1 + 0.5
    assert loss == pytest.approx(math.log(257) + logits.var().item() / 2, abs=0.1)
    assert loss == pytest.approx(math.log(257) + config.d_model * init_std**2 / 2, abs=0.1)


def test_the_meta_device_gives_shapes_and_the_same_names() -> None:
    meta, real = (dict(build_model(everything(), device=device).named_parameters()) for device in ("meta", "cpu"))
    assert {name: p.shape for name, p in meta.items()} == {name: p.shape for name, p in real.items()}
    assert all(p.is_meta for p in meta.values()) and not any(p.is_meta for p in real.values())


def test_names_and_shapes_that_outsiders_rely_on() -> None:
    shapes = {name: tuple(p.shape) for name, p in build_model(everything(d_ff_expert=8)).named_parameters()}
    expected = {
        "embedding.weight": (257, 16),
        "layers.0.seq_norm.weight": (16,),
        "layers.0.seq_layer.q_proj.weight": (16, 16),
        "layers.0.seq_layer.k_proj.weight": (8, 16),
        "layers.0.seq_layer.v_proj.weight": (8, 16),
        "layers.0.seq_layer.o_proj.weight": (16, 16),
        "layers.0.ffn_norm.weight": (16,),
        "layers.0.ffn.gate_proj": (4, 8, 16),
        "layers.0.ffn.up_proj": (4, 8, 16),
        "layers.0.ffn.down_proj": (4, 16, 8),
        "layers.1.seq_layer.in_proj.weight": (64, 16),
        "layers.1.seq_layer.conv1d.weight": (32, 1, 4),
        "layers.1.seq_layer.conv1d.bias": (32,),
        "layers.1.seq_layer.x_proj.weight": (9, 32),
        "layers.1.seq_layer.dt_proj.weight": (32, 1),
        "layers.1.seq_layer.dt_proj.bias": (32,),
        "layers.1.seq_layer.A_log": (32, 4),
        "layers.1.seq_layer.D": (32,),
        "layers.1.seq_layer.out_proj.weight": (16, 32),
        "layers.1.ffn.gate_proj.weight": (24, 16),
        "layers.1.ffn.up_proj.weight": (24, 16),
        "layers.1.ffn.down_proj.weight": (16, 24),
        "final_norm.weight": (16,),
        "lm_heads.0.weight": (257, 16),
        "lm_heads.1.weight": (257, 16),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    for start in ("layers.0.ffn.router.", "layers.2.seq_layer.router.", "layers.0.seq_depth.", "layers.1.ffn_depth."):
        assert any(name.startswith(start) for name in shapes), start


# ---- outputs and losses


@pytest.mark.parametrize("n_heads", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 20])
def test_shapes_of_the_output(length: int, n_heads: int) -> None:
    config = everything(n_pred_tokens=n_heads, aux_loss_weights=(1.0, 0.5, 0.2)[:n_heads])
    output = build_model(config)(random_ids(2, length))
    assert output.logits.shape == (2, length, 257)
    assert output.future_logits.shape == (n_heads - 1, 2, length, 257)
    assert len(output.routing) == 2
    assert output._fields == ("logits", "future_logits", "routing")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_which_terms_there_are_and_one_batch_overfits(mechanism: str) -> None:
    config = tiny(**MECHANISMS[mechanism], n_pred_tokens=3, aux_loss_weights=(1.0, 0.5, 0.1))
    model, ids = build_model(config), random_ids(1, 9)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        terms = model.losses(ids)
        sum(terms.values()).backward()
        optimizer.step()
    expected = ["next_token", "future_2", "future_3"]
    expected += ["moe_balance", "router_z"] * bool(config.moe_layers) + ["mod_predictor"] * config.mod_enabled
    assert list(terms) == expected
    assert all(term.shape == () and term.requires_grad for term in terms.values())
    assert terms["next_token"].item() * 1.6 < 0.5  # from ln 257 = 5.5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_norm_is_torchs(dtype, tolerance) -> None:
    results = []
    for kind, as_dtype in ((RMSNorm, dtype), (nn.RMSNorm, torch.float64)):
        norm = kind(16, eps=0.1).to(as_dtype)
        with torch.no_grad():
            norm.weight.copy_(normal(16, seed=1).to(dtype))
        x = (normal(3, 5, 16) * 2).to(dtype).to(as_dtype).requires_grad_()
        y = norm(x)
        assert y.dtype == as_dtype
        grads = torch.autograd.grad(y, (x, norm.weight), normal(3, 5, 16, seed=2).to(dtype).to(as_dtype))
        results.append({"y": y.detach().double(), "x": grads[0].double(), "weight": grads[1].double()})
    assert_agreement(*results, tolerance)


@torch.no_grad()
def test_a_masked_position_is_never_a_target() -> None:
    """The last token of a window is a target only, never an input: where it is masked, it cannot matter."""
    model, ids = perturb(build_model(everything())).eval(), random_ids(2, 12)
    other, mask = ids.clone(), torch.ones(2, 12, dtype=torch.bool)
    other[:, -1] = (ids[:, -1] + 1) % 257
    first, second = model.losses(ids, mask), model.losses(other, mask)
    assert first["next_token"] != second["next_token"] and first["future_2"] != second["future_2"]
    mask[:, -1] = False
    assert model.losses(ids, mask) == model.losses(other, mask)


def test_auxiliary_terms_are_weighted_and_summed_over_layers() -> None:
    base = {"moe_balance_weight": 1.0, "moe_z_weight": 1.0, "mod_predictor_weight": 1.0}
    model, ids = perturb(build_model(everything(**base))).requires_grad_(False), random_ids(2, 20)
    terms, trunk = model.losses(ids), model.trunk(ids[:, :-1])
    balance = z = 0.0
    for routing in trunk.routing:
        probs, load = routing.logits.softmax(-1).mean(0), torch.zeros(4)
        for expert in routing.expert_ids.flatten().tolist():
            load[expert] += 1 / routing.expert_ids.numel()
        balance += 4 * sum(float(a * b) for a, b in zip(load, probs, strict=True))
        z += sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in routing.logits.tolist()) / len(routing.logits)
    predictor = [F.binary_cross_entropy_with_logits(d.predicted, d.chosen.float()).item() for d in trunk.depth]
    assert len(trunk.routing) == 2 and len(predictor) == 6
    assert terms["moe_balance"].item() == pytest.approx(balance, rel=1e-5)
    assert terms["router_z"].item() == pytest.approx(z, rel=1e-5)
    assert terms["mod_predictor"].item() == pytest.approx(sum(predictor) / 6, rel=1e-5)
    halved = build_model(everything(moe_balance_weight=0.5, moe_z_weight=0.25, mod_predictor_weight=0.125))
    halved.load_state_dict(model.state_dict())
    for name, share in {"moe_balance": 0.5, "router_z": 0.25, "mod_predictor": 0.125, "next_token": 1}.items():
        assert halved.losses(ids)[name].item() == pytest.approx(share * terms[name].item())


@torch.no_grad()
def test_evaluation_and_training_are_one_network_without_depth_and_dropout() -> None:
    ids = random_ids(2, 20)
    model = perturb(build_model(everything(mod_enabled=False)))
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
    dropping = perturb(build_model(everything(mod_enabled=False, dropout=0.3)))
    assert torch.equal(dropping.eval()(ids).logits, model(ids).logits)
    assert not torch.equal(dropping.train()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_depth_is_at_work_in_evaluation_too() -> None:
    """A mechanism that is left out in one mode makes two networks of one; where no predictor asks, nothing is added."""
    model, ids = perturb(build_model(tiny(mod_enabled=True))).eval(), random_ids(2, 20)
    nobody = -torch.ones(2, 20, 1)
    for block in model.layers:
        for depth in (block.seq_depth, block.ffn_depth):
            depth.predictor.register_forward_hook(lambda module, args, out: nobody)
    expected = model.lm_heads[0](model.final_norm(model.embedding(ids)))
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_dropout_drops_the_stated_share_of_every_sublayers_output(monkeypatch) -> None:
    model = perturb(build_model(tiny(dropout=0.25))).train()
    outputs = []

    def recorded(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
        outputs.append((x, dropout(x, p, generator)))
        return outputs[-1][1]

    monkeypatch.setattr(transformer, "dropout", recorded)
    model.trunk(random_ids(8, 40), torch.Generator().manual_seed(0))
    assert len(outputs) == 4  # of two layers, the sequence sublayer's and the feed-forward sublayer's
    model.eval().trunk(random_ids(8, 40))
    assert len(outputs) == 4
    for given, kept in outputs:
        assert (kept == 0).float().mean() == pytest.approx(0.25, abs=0.03)
        torch.testing.assert_close(kept[kept != 0], given[kept != 0] / 0.75)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_with_a_generator_is_torchs_from_the_same_state(dtype: torch.dtype) -> None:
    x, generator = normal(5, 7, 3).to(dtype), torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    for p in (0.3, 0.0, 0.1):
        assert torch.equal(dropout(x, p, generator), F.dropout(x, p))


# ---- gradients


def backward(model: nn.Module, ids: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    torch.manual_seed(5)  # must not matter: dropout draws from the generator
    terms = model.train().report(ids, generator=torch.Generator().manual_seed(5)).terms
    torch.manual_seed(6)
    sum(terms.values()).backward()
    return {name: term.item() for name, term in terms.items()}, gradients(model)


def test_gradients_reach_every_parameter_and_every_expert() -> None:
    _, grads = backward(perturb(build_model(everything(dropout=0.1))), random_ids(8, 40))
    assert not [name for name, grad in grads.items() if not grad.any() or not grad.isfinite().all()]
    stacks = [grad for name, grad in grads.items() if grad.ndim == 3 and "conv1d" not in name]
    assert len(stacks) == 3 and all(grad.flatten(1).any(dim=1).all() for grad in stacks)


def test_recomputing_blocks_changes_nothing() -> None:
    plain, thrifty = (perturb(build_model(everything(dropout=0.2))) for _ in "ab")
    thrifty.recompute_blocks = True
    calls = []
    thrifty.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    ids = random_ids(3, 25)
    (terms, grads), (other_terms, other_grads) = backward(plain, ids), backward(thrifty, ids)
    assert len(calls) == 2  # forward, and again in the backward pass
    assert terms == other_terms
    assert all(torch.equal(grad, other_grads[name]) for name, grad in grads.items())
    thrifty.eval()
    calls.clear()
    sum(thrifty.losses(ids).values()).backward()
    assert len(calls) == 1


@pytest.mark.cuda
def test_cuda_agrees_and_never_waits_for_the_device() -> None:
    """Forward and backward agree with the CPU's; a whole update reads nothing back, which would stop the queue."""
    from moe_lab.config import OptimizerConfig
    from moe_lab.optim import build_optimizers

    config = everything()
    cpu, gpu = perturb(build_model(config)), perturb(build_model(config)).cuda()
    ids = random_ids(2, 33)
    (terms, grads), (gpu_terms, gpu_grads) = backward(cpu, ids), backward(gpu, ids.cuda())
    assert gpu_terms == pytest.approx(terms, rel=1e-4)
    assert_agreement({name: grad.cpu() for name, grad in gpu_grads.items()}, grads, tolerance=1e-3)
    optimizers, on_device = build_optimizers(gpu, OptimizerConfig(), max_lr=0.01), ids.cuda()
    before = gpu.layers[0].ffn.gate_proj.detach().clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):  # the format whose grouped products need no look at the counts
            terms = gpu.losses(on_device)
        sum(terms.values()).backward()
        for optimizer in optimizers:
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(gpu.layers[0].ffn.gate_proj, before)
