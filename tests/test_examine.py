"""What can be seen before the first update: each fault put into a small model beside the same model without it."""

import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import MECHANISMS, model_with
from torch import Tensor, nn

from moe_lab.health import check_causality, examine

V, D, T = 64, 16, 24


class Tiny(nn.Module):
    """Embedding, one causal mixing layer, a feed-forward layer with a residual, a head; `fault` names what is wrong."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fault = fault
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.mix = nn.Conv1d(D, D, 3, padding=1 if fault == "padded on both sides" else 2)
        self.block = Sometimes(D, twice=fault == "residual twice")
        self.only_trained = nn.Linear(D, D)
        self.norm = nn.BatchNorm1d(D, track_running_stats=False) if fault == "batch statistic" else nn.LayerNorm(D)
        self.dropout = nn.Dropout(0.1)
        self.scorer = nn.Linear(D, 1) if fault == "choice in training" else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        mixed = self.mix(x.transpose(1, 2))[:, :, : ids.shape[1]].transpose(1, 2)
        x = x + self.dropout(mixed.detach() if self.fault == "detached" else mixed)
        if self.training or self.fault != "one mode":
            x = x + self.only_trained(x)
        x = self.block(x)
        if self.fault == "a little else in training" and self.training:
            x = x + 0.05 * x.flip(-1)
        if self.fault == "mean over time in training" and self.training:
            x = x + x.mean(1, keepdim=True)
        if self.fault == "top-k over time" or (self.scorer and self.training):
            scores = self.scorer(x).squeeze(-1) if self.scorer else x.norm(dim=-1)
            best = scores.topk(ids.shape[1] // 2, dim=1).indices
            x = torch.where(torch.zeros(x.shape[:2]).scatter(1, best, 1.0).bool().unsqueeze(-1), x.flip(-1), x)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) if self.fault == "batch statistic" else self.norm(x)
        return self.head(x)


class Sometimes(nn.Module):
    """Computes every other token; the others pass."""

    def __init__(self, width: int, twice: bool) -> None:
        super().__init__()
        self.linear, self.twice = nn.Linear(width, width), twice

    def forward(self, x: Tensor) -> Tensor:
        even = (torch.arange(x.shape[1]) % 2 == 0).unsqueeze(-1)
        computed = torch.where(even, x + self.linear(x), x)
        return computed + torch.where(even, 0.0, x) if self.twice else computed


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(4 * (T + 1)).view(4, -1) ** 2 % 31 % V  # squares repeat themselves, as text does
    return ids[:, :-1], ids[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def said(model: nn.Module, loss_fn=loss_of, **options) -> dict[str, str]:
    """Rule → severity of what is at least a warning."""
    examination = examine(model, batch(), loss_fn, **options)
    return {f.rule: f.severity for f in examination.findings if f.severity != "info"}


FAULTS = {
    "": {},
    "padded on both sides": {"future_leak": "error"},
    "top-k over time": {"future_leak": "error"},
    "batch statistic": {"future_leak": "error"},
    "mean over time in training": {"future_leak": "error"},
    "detached": {"no_gradient": "error"},
    "choice in training": {"no_gradient": "error", "mode_mismatch": "warning"},
    "one mode": {"mode_mismatch": "warning"},
    "residual twice": {"scaled_copies": "error"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_nothing_else(fault: str) -> None:
    assert said(Tiny(fault)) == FAULTS[fault]


def test_a_small_difference_between_the_modes_is_seen_beside_dropout() -> None:
    """It is a twentieth of the stream, and dropout moves more."""
    found = examine(Tiny("a little else in training"), batch(), loss_of).findings
    assert [f.severity for f in found if f.rule == "mode_mismatch"] == ["info"]
    assert not [f for f in examine(Tiny(), batch(), loss_of).findings if f.rule == "mode_mismatch"]


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_loss_that_is_scaled(factor: float) -> None:
    assert said(Tiny(), lambda model, batch: factor * loss_of(model, batch)) == {"initial_loss": "warning"}
    assert said(Tiny(), lambda model, batch: 0.05 + loss_of(model, batch)) == {}  # an auxiliary term
    # another head's, as far from its targets as heads are that foretell more
    other = lambda model, batch: loss_of(model, batch) / 2 + loss_of(model, batch).detach()  # noqa: E731
    assert said(Tiny(), other) == {"no_gradient": "warning"}  # it teaches nothing, and tells what it is


@pytest.mark.parametrize("family", ["Bert", "Bart", "Llama"])
def test_a_model_that_may_look_ahead_is_not_judged(family: str) -> None:
    sizes = {"vocab_size": V, "hidden_size": 16, "d_model": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = getattr(transformers, f"{family}Config")(**sizes)
    kind = {"Bert": "ForMaskedLM", "Bart": "ForConditionalGeneration", "Llama": "ForCausalLM"}[family]
    torch.manual_seed(0)
    ids = batch()[0]
    labels = ids
    if family == "Bert":
        masked = torch.rand(ids.shape) < 0.2
        ids, labels = torch.where(masked, V - 1, ids), torch.where(masked, ids, -100)
    examination = examine(getattr(transformers, family + kind)(config), {"input_ids": ids, "labels": labels})
    assert [f.rule for f in examination.findings if f.severity != "info"] == []
    assert ("causality" in examination.not_checked) == (family != "Llama")


def test_nothing_is_changed() -> None:
    model = Tiny().train()
    model.block.eval()
    loss_of(model, batch()).backward()
    before = {n: (p.clone(), p.grad.clone()) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    examine(model, batch(), loss_of, torch.optim.SGD(model.parameters(), 0.1))
    assert model.training and not model.block.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n][0]) and torch.equal(p.grad, before[n][1]) for n, p in model.named_parameters())


def wrap_forward(module: nn.Module, depth: int) -> None:
    """Set a `forward` on the module that calls the former one, as many times, as profilers and dispatchers do."""
    module.forward = functools.partial(module.forward)
    for _ in range(depth):
        module.forward = (lambda inner: lambda *args, **named: inner(*args, **named))(module.forward)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_model_whose_modules_are_wrapped_is_copied_whole(depth: int) -> None:
    model = Tiny()
    for module in (model, model.head):
        wrap_forward(module, depth)
    found = examine(model, batch(), loss_of)
    assert not found.findings and found.not_checked.keys() == {"config", "optimizers"}
    assert all(p.grad is None for p in model.parameters()) and model.head.training


def test_what_was_not_looked_at_is_said() -> None:
    examination = examine(nn.Linear(3, 3), torch.rand(2, 3), lambda model, x: model(x).square().mean())
    assert set(examination.not_checked) == {"config", "optimizers", "first loss", "causality"}
    assert "not checked: optimizers: none was given" in str(examination)
    assert [f.rule for f in examination.findings] == []


def test_set_up_and_config_are_part_of_it() -> None:
    model = Tiny()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-3)
    found = said(model, optimizer=optimizer, config={"training": {"dtype": "bfloat16", "max_lr": 1e-3}})
    assert found["not_in_optimizer"] == "error"


@pytest.mark.parametrize(
    ("cut", "told"),
    [
        (lambda loss: loss.detach(), {"no_gradient": "error"}),
        (lambda loss: loss.detach().requires_grad_(), {"no_gradient": "error"}),
        (lambda loss: loss.item(), {"no_gradient": "error"}),
        (lambda loss: loss * 1.0, {}),
    ],
)
def test_a_loss_without_a_graph(cut, told: dict) -> None:
    found = examine(Tiny(), batch(), lambda model, batch: cut(loss_of(model, batch)))
    assert {f.rule: f.severity for f in found.findings} == told
    assert ("first loss" in found.not_checked) == bool(told)


def test_a_model_that_is_frozen_as_a_whole_is_not_to_be_trained() -> None:
    found = examine(Tiny().requires_grad_(False), batch(), loss_of)
    assert not found.findings and "gradients" in found.not_checked


class InAList(Tiny):
    """Its block is in a list beside its own."""

    def __init__(self, hidden: bool = True):
        super().__init__()
        self.more = [nn.Linear(V, V, bias=False)]
        self.known = None if hidden else self.more[0]

    def forward(self, *args, **kwargs):
        return self.more[0](super().forward(*args, **kwargs))


def test_layers_that_parameters_does_not_hold() -> None:
    for hidden in (True, False):
        model = InAList(hidden)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        assert ("not_in_optimizer" in said(model, optimizer=optimizer)) == hidden
        optimizer.add_param_group({"params": [model.more[0].weight]} if hidden else {"params": []})
        assert "not_in_optimizer" not in said(model, optimizer=optimizer)


class Masked(Tiny):
    """Takes a mask; `uses` it or drops it on the way."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.uses = uses

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        return super().forward(torch.where(mask, input_ids, 0) if self.uses else input_ids)


@pytest.mark.parametrize("uses", [True, False])
def test_an_argument_that_is_dropped_on_the_way(uses: bool) -> None:
    ids, labels = batch()
    whole = {"input_ids": ids, "mask": torch.ones_like(ids).bool()}

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return F.cross_entropy(model(**batch).flatten(0, 1), labels.flatten())

    found = [(f.rule, f.where) for f in examine(Masked(uses), whole, loss).findings if f.severity == "warning"]
    assert [pair for pair in found if pair[0] == "no_effect"] == ([] if uses else [("no_effect", "mask")])


def test_a_tie_that_broke() -> None:
    for tied, config, expected in (
        (True, {"tie_word_embeddings": True}, {}),
        (False, {"tie_word_embeddings": True}, {"broken_tie": "warning"}),
        (False, {"model": {"weight_tying": "on"}}, {"broken_tie": "warning"}),
        (False, {"tie_word_embeddings": False}, {}),
        (False, None, {}),
        ("copied", None, {"broken_tie": "warning"}),
    ):
        model = Tiny()
        if tied:
            weight = model.embedding.weight
            model.head.weight = weight if tied is True else nn.Parameter(weight.detach().clone())
        found = said(model, config=config)
        assert {rule: severity for rule, severity in found.items() if rule != "initial_loss"} == expected


def test_a_classifier_is_no_head_over_the_vocabulary() -> None:
    """A BERT with two classes has a table of two kinds of tokens; its config says that its (absent) heads are tied."""
    sizes = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    ids = batch()[0]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    examination = examine(
        model, {**whole, "labels": torch.tensor([0, 1, 0, 1])}, optimizer=torch.optim.AdamW(model.parameters())
    )
    assert [f.rule for f in examination.findings if f.severity != "info"] == []
    assert "arguments without effect" not in examination.not_checked


def test_an_optimizer_of_tensors_that_are_the_models_no_more() -> None:
    model, old = Tiny(), Tiny()
    assert said(model, optimizer=torch.optim.SGD(old.parameters(), 0.1)) == {"not_in_optimizer": "error"}
    some = [*old.head.parameters(), *[p for n, p in model.named_parameters() if n != "head.weight"]]
    (stale,) = (
        f for f in examine(model, batch(), loss_of, torch.optim.SGD(some, 0.1)).findings if f.severity == "error"
    )
    assert stale.where == "head.weight" and stale.message.startswith("1 tensors of the optimizer are not the model's")
    narrow = Tiny().bfloat16()
    masters = [p.detach().float().requires_grad_() for p in narrow.parameters()]
    assert said(narrow, optimizer=torch.optim.AdamW(masters, 1e-4)) == {}
    adapter = nn.Parameter(torch.zeros(3, 3))  # of another model, trained by the same optimizer
    assert said(model, optimizer=torch.optim.SGD([*model.parameters(), adapter], 0.1)) == {}


@pytest.mark.parametrize(
    ("lr", "dtype", "stuck"), [(1e-4, "bfloat16", True), (1e-2, "bfloat16", False), (1e-4, "float32", False)]
)
def test_a_16_bit_tensor_that_no_gradient_can_move(lr: float, dtype: str, stuck: bool) -> None:
    """LayerNorm's weight is 1, its bias 0: the bias moves."""
    model = Tiny().to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    found = [f for f in examine(model, batch(), loss_of, optimizer).findings if f.rule == "bf16_parameters"]
    assert [(f.severity, f.where) for f in found] == ([("error", "norm.weight")] if stuck else [])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.001)  # warm-up: the peak counts
    found = [f for f in examine(model, batch(), loss_of, scheduler.optimizer).findings if f.rule == "bf16_parameters"]
    assert len(found) == stuck


@pytest.mark.parametrize("begins", [1.0, 0.01, None])
def test_a_warm_up_that_begins_at_its_peak(begins: float | None) -> None:
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if begins is not None:  # None: set in the loop, which is not known yet
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: begins if step == 0 else min(1, (step + 1) / 100))
    for config, expected in (({"warmup_steps": 100}, {"schedule": "warning"}), ({}, {})):
        assert said(model, optimizer=optimizer, config=config) == (expected if begins == 1.0 else {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=1000)
    assert said(model, optimizer=optimizer, config={"warmup_steps": 300}) == {}


@torch.no_grad()
@pytest.mark.parametrize("name", MECHANISMS)
def test_the_labs_model_is_causal_in_evaluation_and_each_leak_is_found_at_its_place(name: str) -> None:
    model = model_with(name).eval()
    assert check_causality(lambda ids: model(ids).logits, 257, 13) is None

    def leaking(ids: Tensor) -> Tensor:
        logits = model(ids).logits
        logits[:, 4] += 0.01 * (ids[:, 9:10] % 7) if ids.shape[1] > 9 else 0
        return logits

    finding = check_causality(leaking, 257, 13)
    assert (finding.rule, finding.where) == ("future_leak", "position 4") and "1 of 12" in finding.message


def test_noise_and_other_shapes_are_refused() -> None:
    for fn, message in ((lambda ids: torch.rand(*ids.shape, 3), "dropout"), (lambda ids: ids.float()[0], "logits")):
        with pytest.raises(ValueError, match=message):
            check_causality(fn, 7, 5)
