"""What several tests share: the CPU-sized model, a way off its start values, and the definition of agreement."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import torch
from torch import Tensor, nn

from moe_lab import build_model
from moe_lab.config import ModelConfig
from moe_lab.model.generate import step

BASE = ModelConfig(
    vocab_size=257,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_ff=24,
    max_seq_len=48,
    n_experts=4,
    moe_top_k=2,
    d_ff_expert=16,
    moe_router_hidden=8,
    mod_router_hidden=8,
    ssm_state_dim=4,
)

MAMBA = {"mamba_enabled": True, "mamba_layers": (0, 1)}
# each mechanism alone, and all at once: MoE beside attention, a plain Mamba, a Routing Mamba, MoD around everything
MECHANISMS = {
    "attention": {},
    "moe": {"moe_layers": (0, 1)},
    "mamba": MAMBA,
    "routing_mamba": {**MAMBA, "moe_layers": (0, 1)},
    "mod": {"mod_enabled": True},
    "all": {
        "n_layers": 3,
        "moe_layers": (0, 2),
        "mamba_enabled": True,
        "mamba_layers": (1, 2),
        "mod_enabled": True,
    },
}


def tiny(**changes) -> ModelConfig:
    """The tests' config; `tiny(moe_layers=(1,))` is a variation of it."""
    return replace(BASE, **changes)


def seeded(kind: Callable, *args, **options):
    """`kind(*args, **options)` with start values that do not depend on which tests ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args, **options)


def perturb(module: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Add noise to every parameter, so that no test passes because a weight is one, zero or like its neighbour."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * std)
    return module


def model_with(mechanism: str, **changes):
    """A tiny model with one of MECHANISMS, off its start values."""
    return perturb(build_model(tiny(**MECHANISMS[mechanism], **changes)))


def caches_of(model: nn.Module, batch: int, length: int) -> list:
    return [block.seq_layer.new_cache(batch, length, torch.device("cpu"), torch.float32) for block in model.layers]


def cached_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of each token of (B, T), one token a step: (B, T, V)."""
    caches = caches_of(model, *ids.shape)
    return torch.stack([step(model, ids[:, t : t + 1], caches) for t in range(ids.shape[1])], dim=1)


def random_ids(*shape: int, seed: int = 0, vocab_size: int = BASE.vocab_size) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(layer: nn.Module, x: Tensor, *args, **options) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A layer's output (the first, if it gives several), and the gradients of a weighted sum of it, the input's too."""
    x = x.detach().clone().requires_grad_()
    y = layer(x, *args, **options)
    y = y[0] if isinstance(y, tuple) else y
    (y * normal(*y.shape, seed=99)).sum().backward()
    return {"output": y.detach()}, gradients(layer) | {"input": x.grad}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; one that no loss reached counts as zero."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_agreement(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Per tensor ‖a − b‖ ≤ tolerance · ‖b‖, or both below 1e-6 of the largest; the same names on both sides."""
    assert ours.keys() == theirs.keys()
    largest = max(t.norm() for t in theirs.values())
    for name, a in ours.items():
        b = theirs[name]
        assert a.shape == b.shape, name
        tiny_both = max(a.norm(), b.norm()) < 1e-6 * largest
        distance = (a.double() - b.double()).norm()
        assert tiny_both or distance <= tolerance * b.double().norm(), f"{name}: {distance / b.norm():.1e} apart"


def assert_nonzero(tensors: dict[str, Tensor]) -> None:
    """Agreement about nothing proves nothing: every tensor must hold something."""
    assert not [name for name, t in tensors.items() if not t.any()]


@contextmanager
def refused(error: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo]:
    """What users are told: an error of this class, one line that holds `match`."""
    with pytest.raises(error, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


def write_notebook(path: Path, *sources: str) -> nbformat.NotebookNode:
    """A notebook of code cells."""
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, sources)], metadata=metadata)
    nbformat.write(notebook, path)
    return notebook


def solved(number: str, **names) -> dict:
    """What the code of notebooks/solutions/<number>.md defines, run with `names` at hand."""
    text = (Path(__file__).parents[1] / "notebooks" / "solutions" / f"{number}.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def resolved(path: str) -> object | None:
    """The object of a dotted path, a module's or a class's; None if there is none."""
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            found: object = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for name in parts[n:]:
            found = getattr(found, name, None)
        return found
    return None
