"""How benchmarks measure, on invented rows; and that `make run` installs no test package."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import docs_table, record
from benchmarks.bench import WORKS
from benchmarks.growth import SIZES, lab, varied
from benchmarks.measure import Products, interval, paired, peak_bytes, products_share
from benchmarks.peers import Tree
from benchmarks.shares import captured, flops
from moe_lab import build_model

ROOT = Path(__file__).parents[1]


def run(seconds: float, **changes) -> dict:
    return {"seed": 0, "step": 600, "loss": 3.69, "seconds": seconds, "cpu_seconds": 2 * seconds, "targets_crc": 7, "compute": "float32"} | changes  # fmt: skip


def test_evaluations_are_no_training_time() -> None:
    evaluation = {"event": "eval", "validation_loss": 8.0}
    rows = [{**evaluation, "step": 0, "seconds": 5.0}]
    rows += [{"step": 1, "loss": 8.0, "seconds": 5.5}, {"step": 2, "loss": 7.0, "seconds": 6.25}]
    rows += [{**evaluation, "step": 2, "seconds": 11.0}, {"step": 3, "loss": 6.0, "seconds": 11.5}]
    assert record.spent(rows, "seconds") == 0.5 + 0.75 + 0.5
    assert record.spent(rows[:1], "seconds") == 0.0


def test_the_ratio_is_that_of_mean_times_on_one_text() -> None:
    before, now = [run(100), run(300)], [run(60, cpu_seconds=100), run(20, cpu_seconds=60)]
    assert record.ratios(before, now) == {"ratio_seconds": 0.2, "ratio_cpu_seconds": 0.2}
    with pytest.raises(ValueError, match="the validation targets differ"):
        record.ratios(before, [run(60, targets_crc=8)])


def test_both_trees_go_to_the_older_ones_target_in_turn(monkeypatch, tmp_path) -> None:
    asked = []

    def train_in(tree, seed, target, overrides) -> dict:
        asked.append((tree.name, seed, target))
        return run(10.0 if tree.name == "now" else 40.0, target=3.69)

    monkeypatch.setattr(record, "train_in", train_in)
    monkeypatch.setattr(record, "tree_of", lambda root, commit: tmp_path / commit)
    found = record.compare(tmp_path / "now", "old", [])
    order = [("old", 0), ("now", 0), ("now", 1), ("old", 1), ("old", 2), ("now", 2)]
    assert asked == [(name, seed, 3.69 if index else None) for index, (name, seed) in enumerate(order)]
    assert [line["ratio_seconds"] for line in found] == [0.25]


def test_several_codes_share_the_runs_of_the_first(monkeypatch, tmp_path) -> None:
    seconds = {"old": 40.0, "abc": 20.0, "now": 10.0}
    monkeypatch.setattr(record, "train_in", lambda tree, seed, *_: run(seconds[tree.name], target=3.69, seed=seed))
    monkeypatch.setattr(record, "tree_of", lambda root, commit: tmp_path / commit)
    found = record.compare(tmp_path / "now", "old", [], ["abc", "now"])
    assert [line["ratio_seconds"] for line in found] == [0.5, 0.25]
    assert found[0]["runs"]["old"] is found[1]["runs"]["old"] and len(found[0]["runs"]["old"]) == record.SEEDS
    assert {r["seconds"] for r in found[0]["runs"]["now"]} == {20.0}


def test_a_record_is_a_line_of_the_list(monkeypatch, tmp_path) -> None:
    (tmp_path / "benchmarks").mkdir()
    line = {"what": "batched Muon", "commit": "abc1234", "machine": "x86_64, AVX2, without bf16 units", "threads": 2}
    line |= {"ratio_seconds": 0.41, "ratio_cpu_seconds": 0.39, "against": "be5cd36"}
    line["runs"] = {"now": [run(90.0, loss=3.68), run(110.0, loss=3.69, step=620)], "be5cd36": []}
    (tmp_path / "benchmarks" / "records.json").write_text(json.dumps([line]))
    monkeypatch.setattr(docs_table, "ROOT", tmp_path)
    assert docs_table.records()[2:] == [
        "| 1 | batched Muon | abc1234 | 0.41 (0.39) × be5cd36 | 610 | 100 | 3.685 ± 0.007 | "
        "x86_64, AVX2, without bf16 units, 2, float32 |"
    ]


def test_pairs_change_their_order_and_the_ratio_is_the_peers_over_ours(monkeypatch) -> None:
    called = []

    def seconds(call) -> float:
        call()
        return {"ours": 2.0, "peer": 5.0}[called[-1]]

    monkeypatch.setattr("benchmarks.measure.seconds", seconds)
    found = paired(lambda: called.append("ours"), lambda: called.append("peer"), pairs=3)
    assert called == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]  # the first two do not count
    assert found["times_faster"] == {"median": 2.5, "low": 2.5, "high": 2.5}
    assert found["seconds_more"]["median"] == -3.0


def test_an_interval_holds_the_median() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found["low"] < found["median"] == 3.0 < found["high"]


def test_the_peak_is_what_was_held_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            held = torch.ones(1 << 20), torch.ones(1 << 20)  # 8 MiB, freed before the next
            del held

    assert peak_bytes(call) == pytest.approx(8 << 20, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"n_pred_tokens": 1, "aux_loss_weights": (1.0,), "n_layers": 3}])
def test_flops_are_those_that_torch_counts(changes: dict) -> None:
    """A dense model. Its mm are everything but attention's scores, of which a kernel makes more or fewer."""
    config = tiny(moe_layers=(), **changes)
    length = 20
    model, ids = build_model(config), torch.randint(config.vocab_size, (2, length))
    with FlopCounterMode(display=False) as counter:
        output = model(ids)
        (output.logits.sum() + output.future_logits.sum()).backward()
    scores = 6 * config.n_layers * config.d_model * length
    norms = 6 * (2 * config.n_layers + 1) * config.d_model  # their weights are counted with the rest
    assert (
        flops(config, 2 * length, length) - 2 * length * (scores + norms)
        == counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    )


def test_a_modules_calls_are_repeated_with_their_gradients() -> None:
    model, ids = build_model(tiny(moe_layers=(0, 1))), torch.randint(257, (2, 12))
    calls = captured([block.ffn for block in model.layers], lambda: model.trunk(ids))
    assert len(calls) == 2
    assert model.layers[1].ffn.up_proj.grad is None
    calls[1]()
    assert model.layers[1].ffn.up_proj.grad.any()
    assert model.layers[0].ffn.up_proj.grad is None
    model.trunk(ids)
    assert len(calls) == 2  # the hooks are gone


def test_sizes_grow_as_they_are_called() -> None:
    for name, (_, values) in SIZES.items():
        assert getattr(lab().model, name) in values
        assert [getattr(varied(name, value), name) for value in values] == list(values)
        assert varied(name, getattr(lab().model, name)) == replace(lab().model)
    assert varied("n_layers", 8).mamba_layers == (2, 6)


def test_two_codes_live_in_one_process(tmp_path) -> None:
    (tmp_path / "moe_lab").mkdir()
    (tmp_path / "moe_lab" / "__init__.py").write_text("WHO = 'older'\n")
    before = sys.modules["moe_lab"]
    tree = Tree(tmp_path)

    def who() -> str:
        import moe_lab

        return moe_lab.WHO

    with tree.active():
        assert who() == "older"
    assert sys.modules["moe_lab"] is before
    assert str(tmp_path) not in sys.path
    heard: list[str] = []
    tree.call(lambda: heard.append(who()))()
    assert heard == ["older"]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_each_work_names_the_test_that_compares_results(work) -> None:
    path, _, name = work.test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8") if name else (ROOT / path).exists()


@pytest.mark.parametrize(("target", "extras"), [("run", "lab"), ("lab", "lab"), ("test", "lab,test"), ("bench", "lab,test")])  # fmt: skip
def test_a_first_run_installs_no_test_package(target: str, extras: str) -> None:
    command = ["make", "--dry-run", "--always-make", "PYTHON=python3", target]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    installed = [line.split('".[')[1].split("]")[0] for line in planned.splitlines() if "pip install" in line]
    assert installed[-1] == extras
    assert installed[0] == "lab"


def test_matrix_products_are_told_from_all_else() -> None:
    """Forward and backward, attention too; a share of nothing is 0."""
    a = torch.randn(64, 64, requires_grad=True)
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    calls = {
        "product": lambda: (a @ a).sum().backward(),
        "attention": lambda: F.scaled_dot_product_attention(q, q, q).sum().backward(),
        "else": lambda: (a * a).relu().sum().backward(),
        "without gradients": torch.no_grad()(lambda: a @ a),
        "in inference": torch.inference_mode()(lambda: F.linear(a, a)),
        "attention in inference": torch.inference_mode()(lambda: F.scaled_dot_product_attention(q, q, q)),
    }
    seconds = {}
    for name, call in calls.items():
        with Products() as products:
            call()
        seconds[name] = products.seconds
    assert seconds.pop("else") == 0 and all(seconds.values())
    assert products_share(calls["else"]) == 0
