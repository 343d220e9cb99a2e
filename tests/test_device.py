"""Where and in which precision a run computes, and what it says when memory is short."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import refused
from tiny_run import steps_of, summary_of, tiny, train
from torch.utils._python_dispatch import TorchDispatchMode

from moe_lab import ConfigError, RunError, Trainer, build_model
from moe_lab.optim import groups_of, products
from moe_lab.train import device, read_record
from moe_lab.train.checkpoint import load_checkpoint, step_path


def test_a_model_is_moved_to_the_device_and_not_away_from_its_optimizers(tmp_path: Path, monkeypatch) -> None:
    """With "meta" in a second device's place, which no machine lacks."""
    monkeypatch.setattr(device, "pick_device", lambda name: torch.device("meta"))
    config = tiny(tmp_path)
    trainer = Trainer(config, tmp_path / "run", model=build_model(config.model))
    assert {p.device.type for p in trainer.model.parameters()} == {"meta"}
    assert {p for group in groups_of(trainer.optimizers) for p in group["params"]} == set(trainer.model.parameters())
    model = build_model(config.model)
    with refused(ConfigError, match=r"^the model given is on cpu and the run on meta: move it there, model.to"):
        Trainer(config, tmp_path / "other", model=model, optimizers=[torch.optim.SGD(model.parameters())])


def test_autocast_computes_in_bfloat16_and_keeps_float32(tmp_path: Path) -> None:
    config = tiny(tmp_path, training={"steps": 1}, precision={"compute": "bfloat16"})
    trainer = Trainer(config, tmp_path / "run")
    computed = set()
    trainer.model.lm_heads[0].register_forward_hook(lambda module, args, y: computed.add(y.dtype))
    trainer.fit()
    states = [value for o in trainer.optimizers for state in o.state.values() for value in state.values()]
    stored = load_checkpoint(step_path(trainer.run_dir, 1))["model_state_dict"]
    kept = {t.dtype for t in (*trainer.model.parameters(), *states, *stored.values())}
    assert (computed, kept) == ({torch.bfloat16}, {torch.float32})


def test_bfloat16_parameters_freeze_the_norms(run: Trainer, tmp_path: Path) -> None:
    """From 1.0, a step of 2^-9 or less is lost in bfloat16; the AdamW LR here stays below it."""
    precision = {"parameters": "bfloat16", "compute": "bfloat16"}
    trainer = train(run.config.with_(precision=precision), tmp_path / "run")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    norms = [p for name, p in trainer.model.named_parameters() if "norm" in name]
    assert len(norms) == 7 and all((p == 1).all() for p in norms)
    rows = steps_of(trainer.run_dir)
    assert max(row["lr"]["adamw"] for row in rows) < 2**-9 and {row["norm_deviation"] for row in rows} == {0.0}
    assert steps_of(run.run_dir)[-1]["norm_deviation"] > 1e-3  # in float32


@pytest.mark.parametrize(("times_faster", "taken"), [(1.2, "float32"), (1.4, "bfloat16")])
def test_auto_takes_bfloat16_where_it_pays(tmp_path: Path, monkeypatch, times_faster: float, taken: str) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 1 / times_faster}
    with monkeypatch.context() as probe:
        probe.setattr(products, "has_fast_bfloat16", lambda device: True)
        probe.setattr(device, "seconds_per_product", lambda a, b: seconds[a.dtype])
        config = tiny(tmp_path, precision={"compute": "auto"}, training={"steps": 2})
        trainer = train(config, tmp_path / "run")
    assert trainer.config.precision.compute == taken
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"]["compute"]
    assert written == taken == load_checkpoint(step_path(tmp_path / "run", 2))["config"]["precision"]["compute"]
    # another probe would say the opposite: what the run began with stands
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(device, "seconds_per_product", lambda a, b: 1.0 / seconds[a.dtype])
    resumed = Trainer(config.with_(training={"steps": 3}), tmp_path / "run", resume=True)
    assert resumed.config.precision.compute == taken


def test_auto_does_not_time_what_is_known_to_be_slow(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda device: False)
    monkeypatch.setattr(device, "seconds_per_product", lambda a, b: pytest.fail("it was timed"))
    config, cpu = tiny(tmp_path, precision={"compute": "auto"}), torch.device("cpu")
    assert device.pick_compute(config, cpu) == "float32"


class Recorder(TorchDispatchMode):
    """Remembers the dtypes that each operation was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += [(func.overloadpacket, x.dtype) for x in args if isinstance(x, torch.Tensor)]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("product", ["mm", "addmm", "bmm", "grouped_mm"])
def test_rounded_products_are_bfloat16_products(product: str) -> None:
    """Forward and backward, to the last bit of torch's own; and none of them is left to the bfloat16 kernels."""
    draw = torch.Generator().manual_seed(0)
    sizes = ((16, 64), (64, 24), (24,), (3, 64, 24))
    tensors = a, b, bias, stack = [torch.randn(size, generator=draw).bfloat16().requires_grad_() for size in sizes]
    ends = torch.tensor([4, 4, 16], dtype=torch.int32)
    compute = {
        "mm": lambda: a @ b,
        "addmm": lambda: torch.addmm(bias, a, b),
        "bmm": lambda: a.expand(3, -1, -1) @ stack,
        "grouped_mm": lambda: F.grouped_mm(a, stack, offs=ends),
    }[product]

    def forward_and_backward() -> list:
        y = compute()
        return [y, *torch.autograd.grad(y.float().square().sum(), tensors, allow_unused=True)]

    native = forward_and_backward()
    with Recorder() as recorder, products.RoundedProducts():
        rounded = forward_and_backward()
    dtypes = {dtype for operation, dtype in recorder.seen if operation in products.PRODUCTS}
    assert torch.float32 in dtypes and torch.bfloat16 not in dtypes
    for expected, found in zip(native, rounded, strict=True):
        if expected is not None:
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected.float(), rtol=2**-7, atol=0.01)


def test_slow_bfloat16_products_are_computed_in_float32(tmp_path: Path, monkeypatch) -> None:
    """A run in bfloat16 throughout, on a device that is slow at it: forward, backward and evaluation; the losses stay."""
    precision = {"compute": "bfloat16", "parameters": "bfloat16"}
    config = tiny(tmp_path, n_words=1000, training={"steps": 2}, precision=precision)
    losses, dtypes = {}, {}
    for fast in (True, False):
        monkeypatch.setattr(products, "has_fast_bfloat16", lambda device, fast=fast: fast)
        with Recorder() as recorder:
            trainer = train(config, tmp_path / str(fast))
        losses[fast] = [row.get("loss", row.get("validation_loss")) for row in read_record(trainer.run_dir)]
        dtypes[fast] = {dtype for operation, dtype in recorder.seen if operation in products.PRODUCTS}
    assert torch.bfloat16 in dtypes[True] and torch.bfloat16 not in dtypes[False]
    assert losses[False] == pytest.approx(losses[True], rel=2e-3)


OUT_OF_MEMORY = (
    r"^out of memory on cpu at step 1: lower training.batch_size \(2; .*max_seq_len \(16\).*d_model \(16\), or set "
)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (torch.OutOfMemoryError(), RunError, OUT_OF_MEMORY),
        (MemoryError(), RunError, OUT_OF_MEMORY),
        (RuntimeError("can't allocate memory"), RunError, OUT_OF_MEMORY),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError, "^shapes cannot be multiplied$"),
        (ValueError("a label: out of memory"), ValueError, "^a label: out of memory$"),
    ],
)
def test_out_of_memory_names_the_sizes_and_another_error_passes(tmp_path, monkeypatch, error, raised, message) -> None:
    trainer = Trainer(tiny(tmp_path), tmp_path / "run")

    def report(ids: torch.Tensor, generator: torch.Generator):
        raise error

    monkeypatch.setattr(trainer.model, "report", report)
    with refused(raised, match=message):
        trainer.fit()
    assert summary_of(tmp_path / "run")["status"] == "failed"


def test_auto_takes_the_first_device_that_is_there(monkeypatch) -> None:
    there = set()
    for kind in ("cuda", "mps"):
        monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: kind in there)
    for kind in ("cpu", "mps", "cuda"):
        there.add(kind)
        assert device.pick_device("auto").type == kind
