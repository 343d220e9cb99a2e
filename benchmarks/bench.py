"""Side by side with what people would otherwise use: `make bench`, some ten minutes on an idle machine.

Pairs in one process, in turn, with one thread and with two, in float32 and, where the CPU multiplies it fast, in bfloat16;
medians with their intervals, and peak memory. Prints a table, writes benchmarks/results.json, the README's lines and
docs/growth.png. That both give the same is a test's business, named in each row.

    make bench THREADS=1                 # on a busy machine: with one thread CPU time is measured, which others do not lengthen
    python -m benchmarks.bench WORD …    # only the works whose name holds a word; nothing is written
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks import growth, peers, shares
from benchmarks.docs_table import bench_cells, write_pages
from benchmarks.measure import computes, paired, peak_bytes, products_share
from moe_lab.config import ROOT
from moe_lab.failures.results import provenance, write_json
from moe_lab.train.device import keep_freed_memory


class Work(NamedTuple):
    name: str
    peer: str
    goal: str  # what the issue of it asks for
    make: Callable[..., peers.Pair]
    test: str  # where the results are compared
    pairs: int = 7
    dtypes: Sequence[str] = ("float32", "bfloat16")
    sizes: Sequence[int | None] = (None,)
    memory: bool = True
    bound: bool = True  # whether matrix products hold it


MODEL = "tests/peers/test_peer_model.py::test_the_whole_model_agrees"
WORKS = [
    Work("training step of Mixtral's shape", "transformers", "1.4 ×, bf16 2 ×", peers.mixtral_step, MODEL),
    Work("default step with optimizers", peers.FIRST, "1.67 ×", peers.default_step, MODEL),
    Work(
        "Muon, the default run's tensors", "torch.optim.Muon", "1.5 ×", peers.muon,
        "tests/peers/test_peer_muon.py", dtypes=("float32",),
    ),
    Work(
        "Mamba block over 4096 tokens", "transformers, slow path", "4 ×", peers.mamba,
        "tests/peers/test_peer_mamba.py::test_mamba_mixer_agrees", 3, ("float32",), (64, 256, 1024, 4096), bound=False,
    ),
    Work(
        "loss over 4 heads, vocabulary 50257", "logits, cross_entropy", "1 ×, memory ÷ 4", peers.heads,
        "tests/test_heads.py::test_head_losses_follow_a_loop", 3,
    ),
    Work(
        "256 new tokens after 256", "transformers", "2 ×", peers.generation,
        "tests/test_generate.py::test_caches_change_nothing", 3, memory=False,
    ),
    Work("evaluation of the validation split", peers.FIRST, "2 ×", peers.evaluation, MODEL, 3, memory=False),
    Work(
        "`from moe_lab import health`, its Watch and preflight", "`import torch`", "+ 0.1 s", peers.imports,
        "tests/test_health_wheel.py", dtypes=("float32",), memory=False, bound=False,
    ),
]  # fmt: skip


def measured(work: Work, dtype: str, size: int | None) -> dict:
    """One row: with one thread, with two, and in memory."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pair = work.make(dtype, *([] if size is None else [size]))
    row = {"work": work.name, "peer": work.peer, "way": pair.peer_kind, "goal": work.goal, "test": work.test}
    row |= {"dtype": dtype, "size": size, "threads": {}}
    for threads in map(int, (os.environ.get("THREADS") or "1 2").split()):
        torch.set_num_threads(threads)
        row["threads"][threads] = paired(pair.ours, pair.peer, work.pairs)
    torch.set_num_threads(1)
    if work.bound:
        row["products"] = round(products_share(pair.ours), 3)
    if work.memory:
        row["bytes"] = {"ours": peak_bytes(pair.ours)}
        if size in work.sizes[:1]:  # the peer's loop over tokens takes minutes to follow at the larger ones
            row["bytes"]["peer"] = peak_bytes(pair.peer)
    return row


def main() -> None:
    keep_freed_memory()
    words = sys.argv[1:]
    works = [work for work in WORKS if not words or any(word in work.name for word in words)]
    rows = []
    for work in works:
        for dtype in [dtype for dtype in work.dtypes if dtype in computes()]:
            for size in work.sizes:
                rows.append(measured(work, dtype, size))
                print(" | ".join(bench_cells([rows[-1]])), flush=True)
    if words:
        return
    made = provenance() | {"cores": os.cpu_count()}
    matrices = [shares.of_step(dtype) for dtype in computes()]
    found = {**made, "rows": rows, "matrix_rate": matrices, "growth": growth.curves()}
    write_json(ROOT / "benchmarks" / "results.json", found)
    growth.draw(found["growth"], ROOT / "docs" / "growth.png")
    write_pages()


if __name__ == "__main__":
    main()
