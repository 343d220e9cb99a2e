"""Factorial runs: paired within a seed, kept by content, resumable, and never mistaken for other settings."""

import json
import math
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from checks import designs
from tiny_run import tiny, train

from moe_lab.config import ConfigError, to_dict
from moe_lab.failures import experiments, results
from moe_lab.failures.experiments import Arm, Experiment, collect, make_trainer, run_cell
from moe_lab.failures.results import Results, load_results, spread
from moe_lab.optim.rounding import REMEDIES
from moe_lab.train import read_record


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Cache and committed results in a temporary place."""
    monkeypatch.setattr(experiments, "CACHE", tmp_path / "cache")
    for module in (experiments, results):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path


def row_of(experiment: Experiment, folder: Path) -> dict:
    """The row of its only cell, computed here."""
    (cell,) = experiment.cells().values()
    return json.loads(run_cell(cell, folder / "row.json").read_text())


def small(folder, **changes) -> Experiment:
    arms = {f"lr {lr}": Arm(config=tiny(folder, training={"max_lr": lr})) for lr in (0.01, 0.03)}
    return Experiment(**({"name": "small", "arms": arms, "seeds": (0, 1), "evaluate_at": (2, 4)} | changes))


def test_every_arm_meets_every_seed_and_rows_say_where_they_come_from(elsewhere) -> None:
    results = collect(small(elsewhere), workers=0, progress=False)
    assert [(row["arm"], row["seed"]) for row in results.rows] == [
        ("lr 0.01", 0), ("lr 0.03", 0), ("lr 0.01", 1), ("lr 0.03", 1)
    ]  # fmt: skip
    assert results.arms() == ["lr 0.01", "lr 0.03"] and results.seeds("lr 0.01") == [0, 1]
    row = results.rows[0]
    assert row["steps"] == 4 and set(row["validation"]) == {"2", "4"} and row["diverged_at"] is None
    assert len(row["corpus"]) == 64 and row["torch"] and row["commit"]
    losses = [results.loss("lr 0.01", seed) for seed in (0, 1)]
    assert results.losses("lr 0.01").mean == statistics.mean(losses)
    assert math.isclose(results.losses("lr 0.01").sd, statistics.stdev(losses))
    gaps = [results.loss("lr 0.03", seed, 2) - results.loss("lr 0.01", seed, 2) for seed in (0, 1)]
    assert math.isclose(results.paired("lr 0.03", "lr 0.01", 2).mean, statistics.mean(gaps))
    assert "4 runs" in results.provenance()


def test_a_cell_is_the_trainers_own_run(elsewhere) -> None:
    mine = row_of(small(elsewhere, seeds=(1,), arms={"a": Arm(config=tiny(elsewhere))}, evaluate_at=(6,)), elsewhere)
    config = tiny(elsewhere, training={"seed": 1, "steps": 6})
    trainer = train(config, elsewhere / "run")
    rows = [row for row in read_record(elsewhere / "run") if row.get("event") == "eval"]
    assert math.isclose(mine["validation"]["6"], rows[-1]["validation_loss"], rel_tol=1e-6)
    assert mine["tokens"] == trainer.tokens()


def test_finished_cells_are_not_run_again(elsewhere, monkeypatch) -> None:
    design = small(elsewhere, seeds=(0,))
    first = collect(design, workers=0, progress=False)
    (elsewhere / "cache" / "runs").joinpath("unrelated.json").write_text("{}")
    monkeypatch.setattr(experiments, "run_cell", None)
    assert collect(design, workers=0, progress=False).rows == first.rows


def fails(*given) -> None:
    raise KeyError("no such remedy")


def test_an_error_keeps_what_is_finished_and_a_process_computes_what_is_computed_here(elsewhere, monkeypatch) -> None:
    bad = {"bad": Arm(config=tiny(elsewhere), remedy=("bad", fails))}
    design = small(elsewhere, seeds=(0,), evaluate_at=(2,))
    design = replace(design, arms=design.arms | bad)
    rows = []
    for workers in (0, 1):
        monkeypatch.setattr(experiments, "CACHE", elsewhere / f"cache of {workers}")
        with pytest.raises(KeyError, match="no such remedy"):
            collect(design, workers=workers, progress=False)
        paths = sorted((experiments.CACHE / "runs").glob("*.json"))
        rows.append([json.loads(path.read_text()) | {"wall_s": 0, "started": ""} for path in paths])
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_committed_results_are_used_only_for_exactly_their_settings(elsewhere, monkeypatch) -> None:
    design = small(elsewhere, seeds=(0,))
    computed = collect(design, workers=0, progress=False)
    computed.save(elsewhere / "results" / "small.json")
    assert load_results("small").rows == computed.rows
    monkeypatch.setattr(
        experiments, "run_cells", lambda cells, *rest: {cell.key: {"anew": True} for cell in cells}.items()
    )
    assert collect(design, progress=False).rows == computed.rows
    anew = [collect(replace(design, evaluate_at=(2, 5)), progress=False), collect(design, redo=True)]
    assert [row["anew"] for table in anew for row in table.rows] == [True] * 4


def key_of(experiment: Experiment) -> str:
    """Of its first cell."""
    return next(iter(experiment.cells().values())).key


def test_a_key_follows_everything_that_a_cell_is_computed_from(elsewhere) -> None:
    base = key_of(small(elsewhere))
    arm = Arm(config=tiny(elsewhere, training={"max_lr": 0.01}))
    variants = [
        small(elsewhere, seeds=(5,)),
        small(elsewhere, evaluate_at=(4,)),
        small(elsewhere, arms={"lr 0.01": Arm(config=arm.config, remedy=("masters", REMEDIES["masters"]))}),
        small(elsewhere, arms={"lr 0.01": Arm(config=arm.config.with_(model={"dropout": 0.2}))}),
    ]
    keys = {base, *map(key_of, variants)}
    assert len(keys) == 5
    renamed = small(elsewhere, name="other", arms={"another name": arm})
    assert key_of(renamed) == base  # a name computes nothing


def test_a_run_that_diverges_is_a_result(elsewhere) -> None:
    wild = tiny(elsewhere, training={"max_lr": 1e30})
    row = row_of(small(elsewhere, seeds=(0,), arms={"wild": Arm(config=wild)}), elsewhere)
    assert row["validation"]["4"] is None
    results = Results("x", [{**row, "arm": "wild", "seed": 0}])
    assert results.loss("wild", 0) == math.inf
    json.dumps(row, allow_nan=False)  # and plain JSON


def test_a_remedy_starts_from_the_same_values(elsewhere) -> None:
    config = tiny(elsewhere, precision={"parameters": "bfloat16"})
    plain, remedied = (
        make_trainer(config, None, elsewhere / "a"),
        make_trainer(config, REMEDIES["masters"], elsewhere / "b"),
    )
    for a, b in zip(plain.model.parameters(), remedied.model.parameters(), strict=True):
        assert a.dtype == b.dtype and (a == b).all()
    assert [type(o).__name__ for o in remedied.optimizers] == ["Rounded", "Rounded"]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_run import tiny
from moe_lab.failures import experiments
from moe_lab.failures.experiments import Arm, Experiment, collect

if __name__ == "__main__":
    experiments.CACHE = Path(sys.argv[1]) / "cache"
    arms = {"long": Arm(config=tiny(Path(sys.argv[1])))}
    collect(Experiment(name="long", arms=arms, seeds=(0,), evaluate_at=(1, 10**6)), workers=1, progress=False)
"""


def test_workers_do_not_outlive_a_parent_that_was_killed(tmp_path) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parent)]
    parent = psutil.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)})
    for _ in range(600):
        if list(tmp_path.glob("*/record.jsonl")):  # it has begun to train
            break
        time.sleep(0.1)
    (worker,) = [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
    assert parent.poll() is None
    parent.kill()
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running()


@pytest.mark.parametrize("design", designs.all_designs(), ids=lambda design: design.name)
def test_the_committed_rows_are_those_of_the_designs(design) -> None:
    """By their keys, or notebook 03 would compute them anew."""
    rows = {(row["arm"], row["seed"]): row["key"] for row in load_results(design.name).rows}
    assert rows == {place: cell.key for place, cell in design.cells().items()}


def test_results_that_do_not_exist_say_so(elsewhere) -> None:
    with pytest.raises(ConfigError, match="no committed results of that name"):
        load_results("nothing")


def test_spread() -> None:
    assert str(spread([1.0, 2.0, 3.0])) == "2.000 ± 1.000"
    assert str(spread([1.0])) == "1.000"
    assert math.isnan(spread([1.0, math.inf]).sd)


def test_designs_vary_what_they_say_and_nothing_else() -> None:
    design = designs.sweep(96)
    lrs = {kind: [n for n in design.arms if n.startswith(kind)] for kind in ("original", "match_rms_adamw", "adamw")}
    assert {len(names) for names in lrs.values()} == {len(designs.SWEEP_LRS)}  # as many for each method
    for design, arm in [(d, arm) for d in designs.all_designs() if d.name.endswith("_96") for arm in d.arms.values()]:
        base, values = to_dict(designs.study_config(96)), to_dict(arm.config)
        if design.name == "horizon_96":
            base["precision"]["compute"], base["training"]["batch_size"] = "float32", 2
        changed = {f"{s}.{k}" for s in base for k in base[s] if base[s][k] != values[s][k]}
        assert changed <= {
            *("training.max_lr", "optimizer.type", "optimizer.adjust_lr", "optimizer.adamw_lr_ratio"),
            *("optimizer.embedding_lr_ratio", "precision.parameters"),
            *(("training.min_lr_ratio",) if design.name == "kept_norms_96" else ()),
        }
    for name, (muon, adamw) in designs.POINTS.items():
        config = designs.attribution(96).arms[f"{name}, float32"].config
        assert config.training.max_lr == muon
        assert math.isclose(config.optimizer.adamw_lr_ratio * config.training.max_lr, adamw)
    wide = designs.study_config(192).model
    assert (wide.width_of_head, wide.init_std) == (designs.study_config(96).model.width_of_head, 0.02)
