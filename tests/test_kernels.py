"""Every operation of a training, an evaluation, generation and a Watch has a kernel on CPUs, NVIDIA's and Apple's GPUs.

No device is needed: what is called is noted as it runs on the CPU, and looked up in torch's own table of kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import torchgen
import yaml
from helpers import MECHANISMS, random_ids, tiny
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from toy import toy, train

from moe_lab.config import OptimizerConfig
from moe_lab.health import Watch
from moe_lab.model import build_model
from moe_lab.optim import build_optimizers

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
COMPOSITE = {"CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional"}
# torch takes these on a CPU alone: scaled_dot_product_attention picks a variant by the device
CPU_ALONE = {
    "_scaled_dot_product_flash_attention_for_cpu": "attention on MPS is _scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "attention on MPS is made of products and softmax",
    "_linalg_svd": "the steps that steps.law_of makes up are taken to the CPU",
}


def listed(entry: dict) -> set[str]:
    dispatch = entry.get("dispatch", {"CompositeImplicitAutograd": ""})
    generated = {"CPU", "CUDA"} if "ufunc_inner_loop" in entry else set()
    return generated | {key.strip() for keys in dispatch for key in keys.split(",")}


@pytest.fixture(scope="module")
def kernels() -> dict[str, set[str]]:
    """Operation with overload → the dispatch keys that have a kernel for it."""
    entries = yaml.load(TABLE.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    rows = {entry["func"].split("(")[0]: entry for entry in entries}
    keys = {}
    for name, entry in rows.items():
        # a structured operation's kernels stand at its out variant
        keys[name] = listed(rows.get(entry.get("structured_delegate"), entry))
        base, _, overload = name.partition(".")
        inner = rows.get(f"{base}.{overload + '_' if overload else ''}out", entry)
        if keys[name] <= COMPOSITE and not listed(inner) & COMPOSITE:
            keys[name] = listed(inner)  # it allocates, and calls this
        for made in entry.get("autogen", "").split(","):
            keys.setdefault(made.strip(), set(COMPOSITE))
    return keys


class Calls(TorchDispatchMode):
    """Notes each operation of torch, and each that makes float64 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.float64: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().removeprefix("aten::")
        if not name.startswith(("profiler::", "mkldnn::")):  # a mark in a trace; a question about the CPU
            self.names.add(name)
        made = out if isinstance(out, (tuple, list)) else [out]
        if any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in made):
            self.float64.add(name)
        return out


def without_kernel(names: set[str], device: str, kernels: dict[str, set[str]]) -> set[str]:
    known = names - CPU_ALONE.keys() if device != "CPU" else names
    return {name for name in known if not kernels[name] & ({device} | COMPOSITE)}


@contextmanager
def watched_updates(dtype: torch.dtype, n_steps: int, calls: Calls) -> Iterator[torch.nn.Module]:
    """A tiny model with every mechanism, a few updates long, everything noted."""
    torch.manual_seed(0)
    model = build_model(tiny(**MECHANISMS["all"]), seed=0).to(dtype)
    optimizers = build_optimizers(model, OptimizerConfig(), 1e-3)
    with calls, Watch(model, optimizers, budget=100) as watch:
        for step in range(n_steps):
            terms = model.losses(random_ids(2, 16, seed=step))
            sum(terms.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            watch.observe(loss=terms["next_token"].detach())
        with redirect_stdout(StringIO()):
            watch.report()
        assert watch.step == n_steps and watch.readings
        yield model


@pytest.fixture(scope="module")
def called() -> set[str]:
    calls = Calls()
    for dtype, n_steps in ((torch.float32, 11), (torch.bfloat16, 21)):
        with watched_updates(dtype, n_steps, calls) as model:
            model.eval()
            with torch.no_grad():
                model(random_ids(1, 8))
                model.generate(random_ids(1, 4), 4)
    return calls.names


@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS"])
def test_everything_that_is_called_has_a_kernel(device, called, kernels) -> None:
    assert {"mm", "index.Tensor", "_foreach_norm.Scalar", "bitwise_and.Scalar"} <= called and len(called) > 100
    assert called <= kernels.keys()
    assert without_kernel(called, device, kernels) == set()


def test_an_operation_without_a_kernel_is_seen(kernels) -> None:
    with Calls() as calls:
        x = torch.arange(6.0)
        x.take(torch.tensor([1])), torch.frexp(x), x[torch.tensor([1])]
    assert without_kernel(calls.names, "MPS", kernels) == {"take", "frexp.Tensor"}
    assert without_kernel(calls.names, "CUDA", kernels) == without_kernel(calls.names, "CPU", kernels) == set()


def test_no_float64_number_is_made_of_samples_on_apples_gpus() -> None:
    """They have none; elsewhere the sums are in float64."""
    model = toy(dtype=torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=2e-4)
    watch = Watch(model, optimizer)
    train(watch, model, [optimizer], 21)
    (bank,) = watch.state.banks
    made = []
    for device in ("cpu", "mps"):
        bank.device = torch.device(device)  # what it asks for its formats; the numbers stay where they are
        with Calls() as calls:
            names, table = bank.sums()
        made.append(table.double()[:, names.index("moved_square") : names.index("moments_rruu")])
        assert bool(calls.float64) == (device == "cpu")
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-9)
