"""Experts of whatever library: found, counted, collapsed or starved."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy import VOCAB, Sparse, Toy, adamw, finding, said, toy, watched

from moe_lab.health import Watch
from moe_lab.health.during.routing import expert_modules


@pytest.mark.parametrize("around", [None, False, True])
def test_counts_under_recomputation(around: bool | None) -> None:
    model = toy(kind=Sparse, around=around)
    watch = watched(model, adamw(model), 25)
    assert said(watch) == ([] if around is None else ["counted_twice"])
    if around is not None:
        assert finding(watch, "counted_twice").where == "mixture.counts"


def test_statistics_that_are_averaged_and_counts_of_several_passes_are_no_double_counts() -> None:
    class Normed(Toy):
        def __init__(self):
            super().__init__()
            self.batch = nn.BatchNorm1d(16)

        def forward(self, ids):
            x = self.embedding(ids)
            return self.head(checkpoint(self.batch, x.mT, use_reentrant=False).mT + x)

    model = toy(kind=Normed)
    for name in ("up", "down", "norm"):
        delattr(model, name)
    assert said(watched(model, adamw(model), 25)) == []
    model = toy(kind=Sparse)
    (optimizer,) = adamw(model)
    with Watch(model, optimizer) as watch:
        for _ in range(25):
            ids = torch.arange(64).view(4, 16)  # the same batch twice an update
            optimizer.zero_grad()
            for _ in range(2):
                (F.cross_entropy(model(ids).flatten(0, 1), ((7 * ids + 3) % VOCAB).flatten()) / 2).backward()
            optimizer.step()
    assert "counted_twice" not in said(watch)


@pytest.mark.parametrize("towards", [0, 2, 3])
def test_experts_collapse_or_starve(towards: int) -> None:
    model = toy(kind=Sparse, towards=towards)
    watch = watched(model, adamw(model), 100)
    total = sum(torch.tensor(look.counts) for look in watch.state.outside.routing.experts[0].loads)
    assert total.sum() == 20 * 128 * 2  # of 20 looks
    assert said(watch) == (["collapsed_experts"] if towards == 2 else [])
    assert "starved_experts" in said(watch, "info") or not towards
    told = [(f.severity, f.step) for f in watch.findings if f.rule == "collapsed_experts"]
    assert told == ([("info", 50), ("warning", 90)] if towards == 2 else [])


def test_a_collapse_that_passes_is_no_alarm() -> None:
    model = toy(kind=Sparse, towards=2)

    def balance(step: int) -> None:
        if step > 55:
            model.mixture.bias.copy_(100.0 * (torch.arange(8) // 2 == step % 4))

    watch = watched(model, adamw(model), 100, before_step=balance)
    assert not said(watch) and "collapsed_experts" in said(watch, "info")


def test_a_collapse_of_one_layer_of_two_is_no_alarm() -> None:
    """What balances them, balances all."""

    class Two(Sparse):
        def __init__(self):
            super().__init__(towards=2)
            self.other = type(self.mixture)(16)

        def forward(self, ids):
            x = self.embedding(ids)
            return self.head(x + self.mixture(self.norm(x)) + self.other(self.down(F.gelu(self.up(self.norm(x))))))

    watch = watched(model := toy(kind=Two), adamw(model), 100)
    assert not said(watch) and finding(watch, "collapsed_experts").where == "mixture"


def test_starved_experts_are_those_without_tokens() -> None:
    model = toy(kind=Sparse, towards=3)
    found = finding(watched(model, adamw(model), 80), "starved_experts")
    assert found.value == 5 and "[3, 4, 5, 6, 7]" in found.message


FAMILIES = {
    "Mixtral": 4,
    "Qwen3Moe": 4,
    "Qwen2Moe": 4,
    "GptOss": 4,
    "Olmoe": 4,
    "Llama": None,
    "Mamba": None,
    "GPT2": None,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_of_experts_are_found_and_what_they_choose_is_counted(family: str) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "n_embd": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "n_head": 2, "n_layer": 2, "head_dim": 16}
    sizes |= {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 16, "state_size": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    n_layers = sum(isinstance(inner, nn.Module) for inner, _ in expert_modules(model).values())
    with Watch(model, optimizer) as watch:
        for _ in range(11):
            ids = torch.randint(VOCAB, (2, 8))
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    loads = {e.name: e.loads for e in watch.state.outside.routing.experts}
    if FAMILIES[family] is None:
        assert loads == {}
    else:
        assert n_layers == len(loads) == 2
        for looks in loads.values():
            assert [look.step for look in looks] == [1, 6, 11]
            assert all(len(look.counts) == 4 and sum(look.counts) == 2 * 8 * 2 for look in looks)
    assert said(watch) == []
