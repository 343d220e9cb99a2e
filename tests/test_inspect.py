"""What a checkpoint shows by itself: runs of this package, files of others, and files that are no checkpoints."""

import functools
import re
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from tiny_run import tiny, train

from moe_lab import build_model
from moe_lab.health.after.inspection import inspect_checkpoint, kind_of
from moe_lab.health.findings import Finding, grouped
from moe_lab.optim.rounding import REMEDIES
from moe_lab.train.checkpoint import step_path

CASE = {"adamw_lr_ratio": 0.3, "embedding_lr_ratio": None}
# wide enough for the LRs of the tests' run to be in the usual range
HEALTHY = {"training": {"max_lr": 0.01}, "optimizer": {"adamw_lr_ratio": 0.2, "embedding_lr_ratio": None}}


def trained(folder: Path, **changes) -> Path:
    """The last checkpoint of a tiny run."""
    return step_path(train(tiny(folder, **changes), folder / "run").run_dir, 6)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("healthy"), **HEALTHY)


@pytest.fixture(scope="module")
def sick(tmp_path_factory) -> Path:
    """The case at a small size: bfloat16 parameters and Muon at 3e-4."""
    sickness = {"precision": {"parameters": "bfloat16"}, "training": {"max_lr": 3e-4}, "optimizer": CASE}
    return trained(tmp_path_factory.mktemp("sick"), **sickness)


def by_rule(findings: list[Finding], *severities: str) -> dict[str, list[Finding]]:
    return grouped((f for f in findings if f.severity in (severities or ("error", "warning"))), attrgetter("rule"))


def edited(path: Path, tmp_path: Path, change) -> list[Finding]:
    """What is found in a copy of a checkpoint that `change(state)` has altered."""
    state = torch.load(path, weights_only=True)
    change(state)
    return inspected(state, tmp_path)


def inspected(content: object, folder: Path, **options) -> list[Finding]:
    """What is found in a file of torch.save with this content."""
    torch.save(content, folder / "f.pt", **options)
    return inspect_checkpoint(folder / "f.pt")


# ---- runs of this package --------------------------------------------------------------------------------------------


def test_a_healthy_run_shows_nothing_but_its_learning_rates(healthy: Path) -> None:
    findings = inspect_checkpoint(healthy)
    assert by_rule(findings) == {}
    stored = by_rule(findings, "info")["lr_baked_in"][0]
    assert stored.value == "muon 0.01, adamw_decayed 0.002, adamw 0.002, scheduler max_lr 0.01"


def test_the_case_shows_frozen_norms_its_format_and_its_learning_rate(sick: Path) -> None:
    found = by_rule(inspect_checkpoint(str(sick)))
    state = torch.load(sick, weights_only=True)
    still = {
        name
        for name, kept in state["initial_sample"].items()
        if state["model_state_dict"][name].flatten()[kept["index"]].equal(kept["value"])
    }
    norms = [name for name in state["model_state_dict"] if "norm" in name]
    assert still >= set(norms)
    by_message = {f.message.split(":")[0]: f for f in found["never_moved"]}
    frozen = by_message[f"{len(norms)} of {len(norms)} norm weights"]
    assert frozen.severity == "error" and "has moved in 6 updates" in frozen.message
    assert sum(int(re.match(r"\d+", f.message)[0]) for f in found["never_moved"]) == len(still)
    assert found["bf16_parameters"][0].severity == "error" and found["bf16_parameters"][0].value == 1.0
    baked = found["lr_baked_in"][0]
    assert baked.severity == "warning" and "muon 0.0003" in baked.value and "lr_too_low" in baked.message
    assert set(found) == {"never_moved", "bf16_parameters", "lr_baked_in"}


def test_a_partly_moved_kind_is_counted_and_one_moved_element_is_enough(healthy: Path, tmp_path: Path) -> None:
    def change(state: dict) -> None:
        for name in ("layers.0.seq_norm.weight", "layers.1.seq_norm.weight", "final_norm.weight"):
            state["model_state_dict"][name] = torch.ones_like(state["model_state_dict"][name])
        state["model_state_dict"]["layers.0.seq_norm.weight"][3] = 1.001

    ((rule, (found,)),) = by_rule(edited(healthy, tmp_path, change)).items()
    assert (rule, found.severity, found.where) == ("never_moved", "error", "layers.1.seq_norm.weight and 1 more")
    assert found.message == "2 of 7 norm weights: no sampled element has moved in 6 updates"


def nothing_moved(state: dict) -> None:
    for name, kept in state["initial_sample"].items():
        kept["value"] = state["model_state_dict"][name].flatten()[kept["index"]]


def no_learning_rate(state: dict) -> None:
    for part in state["optimizer_state_dict"]:
        for group in part["param_groups"]:
            group["lr"] = group["initial_lr"] = 0.0


@pytest.mark.parametrize(
    "change", [nothing_moved, no_learning_rate, lambda state: state.update(optimizer_state_dict=[], step=None)]
)
def test_without_proof_that_it_should_have_moved_it_is_a_warning(sick: Path, tmp_path: Path, change) -> None:
    assert {f.severity for f in by_rule(edited(sick, tmp_path, change))["never_moved"]} == {"warning"}


@pytest.mark.parametrize("sampled", [True, False])
def test_before_the_first_update_nothing_can_be_said(healthy: Path, tmp_path: Path, sampled: bool) -> None:
    state = torch.load(healthy, weights_only=True)
    state = {"state_dict": state["model_state_dict"], "step": 0, "initial_sample": state["initial_sample"]}
    findings = inspected(state if sampled else {**state, "initial_sample": None}, tmp_path)
    assert by_rule(findings) == {}
    assert "before the first update" in by_rule(findings, "info")["never_moved"][0].message


@pytest.mark.parametrize("remedy", ["masters", "kahan", "stochastic"])
def test_what_keeps_lost_bits_is_no_bf16_mistake(tmp_path: Path, remedy: str) -> None:
    config = tiny(tmp_path)
    model = build_model(config.model, seed=0)
    optimizers = REMEDIES[remedy](model, config.optimizer, config.training.max_lr)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    kept = [optimizer.state_dict() for optimizer in optimizers]
    assert model.final_norm.weight.dtype == torch.bfloat16
    findings = inspected({"model_state_dict": model.state_dict(), "optimizer_state_dict": kept}, tmp_path)
    assert "bf16_parameters" not in by_rule(findings, "error", "warning", "info")


def test_steps_that_count_micro_batches(healthy: Path, tmp_path: Path) -> None:
    found = by_rule(edited(healthy, tmp_path, lambda state: state.update(step=24)))["step_counters"]
    assert found[0].message == "the checkpoint says step 24 and its optimizer has made 6 updates"
    assert found[1].message == "tokens_seen is 384 and 24 updates of the stored config are 1536 tokens"


def test_tensors_other_than_expected(healthy: Path, tmp_path: Path) -> None:
    def change(state: dict) -> None:
        weights, sample = state["model_state_dict"], state["initial_sample"]
        del weights["final_norm.weight"]  # named by the sample, not there
        weights["embedding.weight"] = weights["embedding.weight"][:2]  # too small for the sample's indices
        sample["layers.0.seq_norm.weight"] = {"index": torch.tensor([-1]), "value": torch.tensor([1.0])}
        sample["layers.1.seq_norm.weight"] = {"index": torch.tensor([0.5]), "value": torch.tensor([1.0])}
        sample["layers.2.seq_norm.weight"] = {"index": torch.tensor([0, 1]), "value": torch.tensor([1.0])}
        sample["layers.0.ffn_norm.weight"] = [1]
        weights["extra"] = torch.ones(3)
        weights["sparse"] = torch.eye(3).to_sparse()

    findings = edited(healthy, tmp_path, change)
    misfits, unread = by_rule(findings)["unexpected_tensors"]
    assert (misfits.value, misfits.severity) == (6, "warning") and "of another size" in misfits.message
    assert unread.message.startswith("sparse: ")
    assert by_rule(findings, "info")["unexpected_tensors"][0].message.startswith("extra: no start values")
    assert set(by_rule(findings)) == {"unexpected_tensors"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    findings = inspected({"a": torch.tensor([1.0, value, 2.0]), "b": torch.tensor([1.0, 2.0])}, tmp_path)
    ((rule, (found,)),) = by_rule(findings).items()
    assert (rule, found.where, found.severity) == ("nonfinite_values", "a", "error")


def test_kinds() -> None:
    norms = ("layers.0.seq_norm.weight", "final_norm.weight", "transformer.h.3.ln_1.weight", "model.norm.weight")
    assert {kind_of(name) for name in norms} == {"norm weights"}
    assert kind_of("h.0.ln_1.bias") == "norm biases"
    assert kind_of("layers.12.ffn.conv1d.weight") == "layers.*.ffn.conv1d.weight"


# ---- files of others -------------------------------------------------------------------------------------------------


def foreign() -> dict[str, torch.Tensor]:
    """The shape of the case's first checkpoint: norms at exactly 1, everything else random."""
    weights = {f"layers.{i}.seq_norm.weight": torch.ones(8, dtype=torch.bfloat16) for i in range(49)}
    weights |= {f"layers.{i}.q_proj.weight": torch.randn(8, 8).bfloat16() for i in range(3)}
    return weights | {"head.bias": torch.zeros(8), "other.bias": torch.full((4,), 0.5), "scale": torch.ones(())}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
def test_constants_of_a_foreign_file(tmp_path: Path, key: str | None, zipped: bool) -> None:
    weights = foreign()
    weights["layers.7.seq_norm.weight"][5] = 0.996  # one element that moved is enough
    content = {key: weights, "step": 754} if key else weights
    findings = inspected(content, tmp_path, _use_new_zipfile_serialization=zipped)
    assert [f.message for f in by_rule(findings)["never_moved"]] == [
        "48 of 49 norm weights: exactly 1 in every element, as at a start",
        "1 of 1 head.bias: exactly 0 in every element, as at a start",
        "1 of 1 other.bias: exactly 0.5 in every element, as at a start",
    ]
    assert {f.severity for f in by_rule(findings)["never_moved"]} == {"warning"}
    (others,) = by_rule(findings, "info")["never_moved"]
    assert "any two draws differ" in others.message and "health.start_sample(model)" in others.advice
    assert by_rule(findings, "info")["bf16_parameters"][0].value == pytest.approx(52 / 55)  # no optimizer: cannot tell


@pytest.mark.parametrize(("state", "severity"), [({}, "error"), ({"master": torch.ones(8)}, None)])
def test_the_optimizer_of_a_foreign_file(tmp_path: Path, state: dict, severity: str | None) -> None:
    moments = {0: {"step": torch.tensor(188.0), "exp_avg": torch.zeros(8), **state}}
    optimizer = {"state": moments, "param_groups": [{"lr": 9e-5, "params": [0]}]}
    content = {"model": foreign(), "optimizer": optimizer, "step": 754, "lr_scheduler": {"base_lrs": [3e-4]}}
    findings = inspected(content, tmp_path)
    assert [f.severity for f in findings if f.rule == "bf16_parameters"] == ([severity] if severity else [])
    (found,) = by_rule(findings)["step_counters"]
    assert found.message == "the checkpoint says step 754 and its optimizer has made 188 updates"
    assert by_rule(findings, "info")["lr_baked_in"][0].value == "group_0 9e-05, scheduler base_lrs 0.0003"


def wrapped(optimizer: dict, how: str) -> dict:
    """The same state dict where trainers keep it: by name, in a list, beside a scaler, in a folder of everything."""
    places = {"named": {"optimizer": {"muon": optimizer}}, "listed": {"optimizer_states": [optimizer]}}
    places |= {
        "wrapper": {"optim": {"optimizer": optimizer, "scaler": {"scale": 1.0}}},
        "flat": {"optimizer": optimizer},
    }
    return places.get(how) or {"trainer": {"inner": [{"opt": optimizer}]}}


@pytest.mark.parametrize("how", ["flat", "named", "listed", "wrapper", "trainer"])
def test_an_optimizers_state_is_found_wherever_it_lies(tmp_path: Path, how: str) -> None:
    """A file whose states lie deeper was called a copy to run, and its learning rates and counts were not read."""
    moments = {0: {"step": torch.tensor(188.0), "exp_avg": torch.zeros(8)}}
    optimizer = {"state": moments, "param_groups": [{"lr": 9e-5, "params": [0]}]}
    findings = inspected({"model": foreign(), "global_step": 754, **wrapped(optimizer, how)}, tmp_path)
    assert [f.severity for f in findings if f.rule == "bf16_parameters"] == ["error"]
    assert by_rule(findings, "info")["lr_baked_in"][0].value == "group_0 9e-05"
    (found,) = by_rule(findings)["step_counters"]
    assert found.message == "the checkpoint says step 754 and its optimizer has made 188 updates"
    moments[0]["master"] = torch.ones(8)
    for step in (187, 188):  # a loop that counts from 0 is as sound
        findings = inspected({"model": foreign(), "global_step": step, **wrapped(optimizer, how)}, tmp_path)
        assert not {"bf16_parameters", "step_counters"} & set(by_rule(findings))


def test_a_trainer_that_counts_the_steps_of_each_optimizer(tmp_path: Path) -> None:
    one = {"state": {0: {"step": torch.tensor(50.0)}}, "param_groups": [{"lr": 9e-5, "params": [0]}]}
    content = {"state_dict": {"a": torch.randn(9)}, "global_step": 100, "optimizer_states": [one, one]}
    assert "step_counters" not in by_rule(inspected(content, tmp_path))


def test_odd_contents_do_not_stop_it(tmp_path: Path) -> None:
    odd = {"scheduler": 3, "config": [1], "step": "many", "tokens_seen": None}
    odd |= {"optimizer": {"state": [1], "param_groups": "x"}}
    odd |= {"optimizer_b": {"state": {0: 3}, "param_groups": [4, {"lr": "x"}]}, "initial_sample": "none"}
    fp8 = {"a": torch.ones(4).to(torch.float8_e4m3fn), "b": torch.tensor([1, 1]), "c": torch.empty(0)}
    assert [f.message for f in inspected({"model": fp8, **odd}, tmp_path) if f.severity != "info"] == [
        "1 of 1 a: exactly 1 in every element, as at a start"
    ]


def test_tokens_are_counted_by_whatever_names_a_config_has(tmp_path: Path) -> None:
    config = {"data": {"block_size": 8, "batch_size": 4}, "trainer": {"grad_accum_steps": 2}}
    content = {"model": foreign(), "step": 3, "n_tokens": 64, "config": config}
    (found,) = by_rule(inspected(content, tmp_path))["step_counters"]
    assert (found.where, found.value, found.limit) == ("n_tokens", 64, 3 * 8 * 4 * 2)
    assert "step_counters" not in by_rule(inspected(content | {"step": 1}, tmp_path))


ADAMW = {"lr": 1.0, "optimizer": "adamw"}
NESTED = functools.reduce(lambda inner, _: {"a": inner}, range(60), {})


@pytest.mark.parametrize(
    ("config", "is_judged"),
    [
        (ADAMW | {"d_model": 768, "n_layers": 12}, True),
        *((config, False) for config in (ADAMW, None, NESTED, dict.fromkeys(map(str, range(10_001)), 1))),
    ],
)
def test_stored_rates_are_judged_by_the_weights_that_are_there(tmp_path: Path, config, is_judged: bool) -> None:
    """By the tensors' own count; and not at all where the config is no transformer's, or none."""
    optimizer = {"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    content = {"model": {"a": torch.randn(2000, 1000)}, "optimizer": optimizer, "config": config, "step": 1}
    (found,) = (f for f in inspected(content, tmp_path) if f.rule == "lr_baked_in")
    assert ("a transformer of 2e+06 parameters" in found.message) == (found.severity == "warning") == is_judged
