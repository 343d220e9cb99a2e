"""A watch on each of two ranks: do they agree? Processes meet as gloo's do; what each finds comes back in a file."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_lab.connect.distributed import leave
from moe_lab.health import Watch

VOCAB, UPDATES = 64, 30


class Model(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(VOCAB, width), nn.Linear(width, width)
        self.head = nn.Linear(width, VOCAB)

    def forward(self, ids):
        return self.head(torch.relu(self.hidden(self.embedding(ids))))


def train(rank: int, case: str) -> list[str]:
    torch.manual_seed(0 if case != "parts of a model" else rank)  # parts of one model differ, and see the same tokens
    model = Model()
    if case == "sharded":
        fully_shard(model)
    wrapped = model if case in ("sharded", "not averaged", "parts of a model") else DistributedDataParallel(model)
    called = model if case == "module called past its wrapper" else wrapped
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = torch.Generator().manual_seed(0 if case in ("one seed", "parts of a model") else rank)
    with Watch(model, optimizer, quiet=True) as watch:
        for step in range(UPDATES):
            ids = torch.randint(VOCAB, (4, 17), generator=data).cumsum(1) % VOCAB
            logits = called(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            if case == "one rank's NaN" and rank == 1 and step > 12:
                loss = loss * float("nan")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.observe(loss=loss.detach())
            dist.barrier()
    return [f"{f.rule}: {f.message} @{f.step}" for f in watch.findings]


SICK = {
    "one seed": "ranks_same_data",
    "not averaged": "ranks_apart",
    "module called past its wrapper": "ranks_apart",
    "one rank's NaN": "one_rank_nonfinite",
}
HEALTHY = ["healthy", "sharded", "parts of a model"]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {case: train(rank, case) for case in (*SICK, *HEALTHY)}
    Path(folder, f"found_{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
    leave(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), 2)
    return [json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("case", "rule"), SICK.items())
def test_ranks_that_disagree_are_named_by_each_of_them(found: list, case: str, rule: str) -> None:
    for mine in found:
        about_ranks = [line for line in mine[case] if "rank" in line.split(":")[0]]
        assert [line.split(":")[0] for line in about_ranks] == [rule], mine[case]
        assert int(about_ranks[0].rsplit("@", 1)[1]) <= 30
        assert case != "one rank's NaN" or "rank 1 was NaN" in about_ranks[0]


@pytest.mark.parametrize("case", HEALTHY)
def test_ranks_that_agree_are_not(found: list, case: str) -> None:
    assert not [line for mine in found for line in mine[case] if "rank" in line.split(":")[0]]
