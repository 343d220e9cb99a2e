"""Side by side with peers: `make bench` prints a table and writes benchmarks/results.json.

Each pair is timed in turn, A B A B …, and the ratio is the median over pairs, so that a machine whose speed drifts does
not favour either. Times are milliseconds for forward and backward (or for one update).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moe_lab import build_model, load_config
from moe_lab.config import ROOT, ModelConfig
from moe_lab.failures.results import provenance, write_json
from moe_lab.model.mamba import Mamba
from moe_lab.model.moe import MoE
from moe_lab.model.scan import selective_scan
from moe_lab.optim import Muon
from moe_lab.train.device import keep_freed_memory

PAIRS = 7


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def row(name: str, peer: str, pairs: Sequence[tuple[float, float]]) -> dict:
    """Medians of ours and the peer's milliseconds and, over pairs, of their ratio."""
    ours, theirs = (round(statistics.median(times), 1) for times in zip(*pairs, strict=True))
    ratio = round(statistics.median(b / a for a, b in pairs), 2)
    return {"what": name, "peer": peer, "ours_ms": ours, "peer_ms": theirs, "peer_over_ours": ratio}


def compare(name: str, ours: Callable, peer_name: str, peer: Callable) -> dict:
    ours(), peer()
    return row(name, peer_name, [(milliseconds(ours), milliseconds(peer)) for _ in range(PAIRS)])


def backward(module: nn.Module, x: Tensor) -> None:
    y = module(x)
    (y[0] if isinstance(y, tuple) else y).sum().backward()


def scan() -> dict:
    """The scan by blocks against the plain loop over tokens, with the states kept for autograd."""
    torch.manual_seed(0)
    delta, x = torch.rand(8, 256, 384) * 0.1, torch.randn(8, 256, 384)
    B, C = torch.randn(2, 8, 256, 8)
    A = -torch.arange(1.0, 9)[:, None].repeat(1, 384)
    inputs = [t.requires_grad_() for t in (delta, A, B, C, x)]

    def plain(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        decays = torch.exp(delta.unsqueeze(2) * A).unbind(1)
        added = (B.unsqueeze(3) * (delta * x).unsqueeze(2)).unbind(1)
        state, states = torch.zeros_like(added[0]), []
        for decay, new in zip(decays, added, strict=True):
            state = torch.addcmul(new, decay, state)
            states.append(state)
        return (C.unsqueeze(2) @ torch.stack(states, 1)).squeeze(2), state

    def gradients(scan: Callable[..., tuple[Tensor, Tensor]]) -> None:
        torch.autograd.grad(scan(*inputs)[0].sum(), inputs)

    name = "selective scan, 8 × 256 × 384, 8 states"
    return compare(name, partial(gradients, selective_scan), "plain loop", partial(gradients, plain))


def against_transformers() -> list[dict]:
    from transformers import MambaConfig, MixtralConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = ModelConfig(d_model=192, moe_layers=(0,), d_ff_expert=256, ssm_state_dim=8, moe_router_hidden=0)
    x = torch.randn(8, 256, 192, requires_grad=True)
    sizes = {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2}
    pairs = {
        "Mamba block, 8 × 256 × 192": (
            Mamba(config),
            MambaMixer(MambaConfig(hidden_size=192, state_size=8, num_hidden_layers=1), 0),
        ),
        "MoE block, 8 experts top-2, 8 × 256 × 192": (
            MoE(config),
            MixtralSparseMoeBlock(MixtralConfig(hidden_size=192, **sizes)),
        ),
    }
    for p in nn.ModuleList(module for pair in pairs.values() for module in pair).parameters():
        nn.init.normal_(p, std=0.02)
    calls = {name: [partial(backward, module, x) for module in pair] for name, pair in pairs.items()}
    return [compare(name, ours, "transformers", peer) for name, (ours, peer) in calls.items()]


def muon() -> dict:
    """A stack of matrices in one call against torch.optim.Muon, one matrix at a time."""
    stack = nn.Parameter(torch.randn(16, 256, 192))
    singles = [nn.Parameter(w.detach().clone()) for w in stack]
    stack.grad = torch.randn_like(stack)
    for p, g in zip(singles, stack.grad, strict=True):
        p.grad = g.clone()
    ours, peer = Muon([stack], lr=0.02), torch.optim.Muon(singles, lr=0.02)
    return compare("Muon, a stack of 16 matrices 256 × 192", ours.step, "torch.optim.Muon", peer.step)


def training_step(keep: bool) -> float:
    """Median milliseconds of a training step of the lab's model, without the optimizer."""
    if keep and not keep_freed_memory():
        return float("nan")
    config = load_config(ROOT / "configs" / "lab.yaml")
    model = build_model(config.model)
    ids = torch.randint(config.model.vocab_size, (config.training.batch_size, config.model.max_seq_len + 1))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            sum(model.losses(ids).values()).backward()

    step()
    return statistics.median(milliseconds(step) for _ in range(PAIRS))


def allocator() -> dict:
    """A process with and one without glibc keeping freed memory, in turn."""

    def in_a_process(keep: bool) -> float:
        command = [sys.executable, "-m", "benchmarks.bench", "step", str(int(keep))]
        return float(subprocess.check_output(command, text=True, cwd=ROOT))

    pairs = [(in_a_process(True), in_a_process(False)) for _ in range(3)]
    return row("training step of the lab's model", "glibc's default allocator", pairs)


def main() -> None:
    if sys.argv[1:2] == ["step"]:
        print(training_step(keep=sys.argv[2] == "1"))
        return
    keep_freed_memory()
    rows = [scan(), *against_transformers(), muon(), allocator()]
    print(f"{'what':46} {'ours ms':>9} {'peer ms':>9} {'peer/ours':>10}  peer")
    for row in rows:
        print(f"{row['what']:46} {row['ours_ms']:9} {row['peer_ms']:9} {row['peer_over_ours']:10}  {row['peer']}")
    made = provenance() | {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    write_json(ROOT / "benchmarks" / "results.json", made | {"rows": rows})


if __name__ == "__main__":
    main()
