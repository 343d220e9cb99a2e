"""Every kind of tensor that an optimizer may hold, and input that cannot be watched."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import refused
from torch import nn
from torch.optim import SGD, AdamW
from toy import VOCAB, adamw, finding, loss_of, said, toy, train, watched

from moe_lab.health import Watch
from moe_lab.optim import Muon


class Odd(nn.Module):
    """A convolution in channels_last, a scalar, a complex vector, an empty tensor, an integer one that is not trained."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.wave = nn.Parameter(torch.ones(6, dtype=torch.complex64))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.table = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, x):
        y = self.conv(x).mean(dim=(0, 2, 3))[:6]
        return (self.scale * (y * self.wave).abs() ** 2).sum() + (self.wave.imag - 0.5).square().sum()


@pytest.mark.parametrize("fused", [False, True])
def test_odd_tensors_are_watched(fused) -> None:
    model = Odd()
    optimizer = AdamW(
        [p for p in model.parameters() if p.is_floating_point() or p.is_complex()], lr=1e-2, foreach=not fused
    )
    with Watch(model, optimizer, expect_frozen=["table"]) as watch:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(2, 3, 8, 8)).backward()
            optimizer.step()
    readings = {r.name: r for r in watch.readings}
    assert set(readings) == {"conv.weight", "conv.bias", "scale", "wave"}
    assert readings["wave"].n_elements == 12  # real and imaginary parts
    assert readings["scale"].n_elements == 1 and readings["scale"].param.shape == ()
    assert said(watch) == []
    (t,) = [t for t in watch.state.tracked if t.name == "conv.weight"]
    assert torch.equal(t.sample(model.conv.weight), model.conv.weight.detach().contiguous().flatten()[t.index])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_number_formats(dtype) -> None:
    """In float64 even a step of 1e-12 arrives, which float32 copies of the samples would not show."""
    model = toy(dtype=dtype)
    watch = watched(model, adamw(model, 1e-12 if dtype == torch.float64 else 1e-4, weight_decay=0.0, eps=1e-7), 40)
    assert ("lost_updates" in said(watch, "error")) == (dtype.itemsize == 2)
    assert "frozen_tensor" not in said(watch)
    assert {r.param.dtype for r in watch.readings} == {r.state_dtypes[0] for r in watch.readings} == {dtype}
    if dtype == torch.float64:
        assert max(r.unchanged for r in watch.readings) == 0


def test_a_scalar_and_a_late_joiner_are_replayed_with_their_own_counts() -> None:
    """Bias correction of a first step differs from that of a tenth."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(100.0))
            self.early = nn.Parameter(torch.full((50,), 100.0))
            self.late = nn.Parameter(torch.full((50,), 100.0))

    model = Late().bfloat16()
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.9), weight_decay=0.0)
    watch = Watch(model, optimizer)
    for step in range(30):
        optimizer.zero_grad()
        names = ("scale", "early", "late") if step >= 10 else ("scale", "early")
        sum(getattr(model, name).float().sum() for name in names).backward()
        optimizer.step()
    watch.check()
    meant = {r.name: math.sqrt(r.intended_square / r.n_touched) for r in watch.readings}
    # a gradient that never changes moves by the learning rate each time
    assert meant == pytest.approx({"scale": 30e-4, "early": 30e-4, "late": 20e-4}, rel=0.02)
    assert {r.gradient for r in watch.readings} == {"lost"}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB, bias=False)

    def forward(self, ids):
        return F.linear(self.embedding(ids), self.head.weight)


@pytest.mark.parametrize("share", [lambda weight: weight, lambda weight: nn.Parameter(weight.data)])
def test_tied_weights_are_one_tensor(share) -> None:
    """One object, or two of one storage."""
    model = Tied()
    model.head.weight = share(model.embedding.weight)
    watch = watched(model, [AdamW([model.embedding.weight], lr=1e-2)], 40)
    assert [r.name for r in watch.readings] == ["embedding.weight"]
    assert said(watch) == []


def test_a_loop_that_keeps_float32_masters_is_healthy() -> None:
    model = toy(dtype=torch.bfloat16)
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = AdamW(masters, lr=1e-4)
    with Watch(model, optimizer) as watch:
        for step in range(60):
            loss = loss_of(model, step)
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for master, grad in zip(masters, grads, strict=True):
                master.grad = grad.float()
            optimizer.step()
            with torch.no_grad():
                for p, master in zip(model.parameters(), masters, strict=True):
                    p.copy_(master)
    assert not {"lost_updates", "not_in_optimizer", "no_gradient", "frozen_tensor"} & set(said(watch))
    assert {r.param.dtype for r in watch.readings} == {torch.float32}
    assert {r.gradient for r in watch.readings} == {"yes"}


@pytest.mark.parametrize("kind", [SGD, torch.optim.SparseAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_gradients_disturb_nothing(kind, dtype) -> None:
    model = toy(dtype=dtype)
    model.embedding.sparse = True
    others = [p for p in model.parameters() if p is not model.embedding.weight]
    optimizers = [kind([model.embedding.weight], lr=0.01), AdamW(others, lr=0.01)]
    watch = watched(model, optimizers, 60)
    assert not {"not_measured", "frozen_tensor", "no_gradient"} & set(said(watch))
    assert {r.name: r.gradient for r in watch.readings}["embedding.weight"] == "yes"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_an_error(value) -> None:
    model = toy()

    def spoil(step):
        if step == 5:
            model.up.weight.grad[0, 0] = value

    watch = watched(model, [SGD(model.parameters(), lr=1e-3)], 12, before_step=spoil)
    assert "nonfinite_gradient" in said(watch, "error")
    assert "up.weight" in finding(watch, "nonfinite_gradient").where


@pytest.mark.parametrize(
    ("wrapper", "prefix"), [(nn.DataParallel, "module."), (partial(torch.compile, backend="eager"), "_orig_mod.")]
)
def test_a_wrapper_of_the_model_changes_the_names_alone(wrapper, prefix) -> None:
    inner = toy()
    model = wrapper(inner)
    watch = watched(model, adamw(model), 25)
    assert {r.kind for r in watch.readings} == {prefix + name for name, _ in inner.named_parameters()}
    assert watch.state.forward.vocab_size == VOCAB and watch.state.forward.logit_variance is not None
    assert said(watch) == [] and watch.step == 25


def test_a_sharded_model_is_watched_by_its_own_part(tmp_path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        model = toy(dtype=torch.bfloat16)
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        watch = watched(model, adamw(model, 2e-4), 40)
    finally:
        dist.destroy_process_group()
    assert type(model.up.weight).__name__ == "DTensor"
    assert said(watch)[0] == "lost_updates"
    assert watch.state.forward.matters(model.up.weight) is None  # a pass would wait for the other processes


# ---- input that cannot be watched ------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line(tmp_path) -> None:
    def refused_as(match: str, *args, **kwargs) -> None:
        with refused(ValueError, match=match):
            Watch(*args, **kwargs)

    model = toy()
    optimizer = AdamW(model.parameters())
    refused_as("no parameter of the model is in the optimizer", model, [])
    refused_as("not a torch.optim.Optimizer", model, [model])
    refused_as("meta device", nn.Linear(2, 2, device="meta"), optimizer)
    refused_as("no parameter of the model is in the optimizer", nn.ReLU(), optimizer)
    refused_as("no parameter of the model is in the optimizer", model, AdamW(toy(1, width=8).parameters()))
    copied = copy.deepcopy(model)  # the optimizer trains another object than the one that is used
    refused_as("no parameter of the model is in the optimizer", model, AdamW(copied.parameters()))
    refused_as("no parameter's name starts with 'lm_head'", model, optimizer, expect_frozen=["lm_head"])
    refused_as("must be a list", model, optimizer, expect_frozen="head")
    (tmp_path / "file").touch()
    refused_as("cannot be written", model, optimizer, log=tmp_path / "file" / "log.jsonl")


def test_a_parameter_in_two_optimizers_is_an_error_at_once() -> None:
    model = toy()
    watch = Watch(model, [AdamW(model.parameters()), Muon([model.up.weight])])
    assert said(watch, "error") == ["updated_twice"] and watch.findings[0].where == "up.weight"
    assert "updated_twice" not in said(Watch(model, AdamW(model.parameters())), "error")
    with pytest.raises(ValueError, match="more than one parameter group"):  # torch's own
        AdamW([{"params": [model.up.weight]}, {"params": [model.up.weight]}])


def test_two_parameters_in_the_same_memory_move_twice() -> None:
    for tied, told in ((True, []), (False, ["updated_twice"])):
        model = toy()
        if tied:
            model.head.weight = model.embedding.weight
        else:
            model.head.weight.data = model.embedding.weight.data
        assert said(Watch(model, AdamW(model.parameters(), weight_decay=0.0)), "error") == told


def test_the_report_fits_the_page(capsys, monkeypatch) -> None:
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        model = nn.ModuleDict({"a_module_with_a_rather_long_name_of_its_own": toy(dtype=torch.bfloat16)})
        optimizer = AdamW(model.parameters(), lr=1e-4)
        watch = Watch(model, optimizer)
        train(watch, next(iter(model.values())), [optimizer], 23)
        watch.report()
        lines = capsys.readouterr().out.split("\n")
        table = lines[: next(i for i, line in enumerate(lines) if line.startswith("format:"))]
        assert table[0] == "after 23 updates" and len(table) == 2 + len(watch.readings)
        assert max(map(len, table)) <= columns
        norm = next(line for line in table if "norm.weight" in line).split()
        assert norm[1:4] == ["1", "bf16/bf16", "lost"] and norm[-1] == "0%"


def test_a_report_in_a_notebook_names_each_tensor_whole(capsys, monkeypatch) -> None:
    """There is no terminal to fit: names of 38 letters, as a router's in moe_lab, are not cut to the same stump."""
    monkeypatch.delenv("COLUMNS", raising=False)
    names = [f"layers_0_ffn_router_{part}" for part in ("hidden_proj", "output_gate")]
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    Watch(model, AdamW(model.parameters())).report()
    table = capsys.readouterr().out
    assert all(f"{name}.weight " in table for name in names)
