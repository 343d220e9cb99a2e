"""What each bug that the report missed costs, alone and together, and what the commit that "fixed" the run could have shown.

    python -m benchmarks.bug_study              # all arms; finished cells are kept in .cache
    python -m benchmarks.bug_study run ARM …    # these arms alone
    python -m benchmarks.bug_study list

A small model with every mixture, the package's own trainer, 150 updates of 512 tokens of real text, one thread. An arm plants
bugs by their ids (moe_lab/failures/bugs.yaml); B01 and B02 are settings. Paired by start values and data order. The ruler is
the validation loss on real text, measured by healthy code but for the model's own forward pass; so B22 and B26, which spoil
the ruler, and B07, B13, B16, B20, B23 and B25, which no single run feels, are not here.

Seed 0 was the pilot: at it, with a layer more and two micro-batches an update, the single bugs were tried before the arms were
chosen. The study's seeds are 1, 2 and 3. Without accumulation B12 changes nothing, so it is not here either.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from checks.study_06 import ALONE, FACTORS, replay_name, subset_name

from moe_lab.config import ROOT, Config, load_config
from moe_lab.failures.experiments import Arm, Experiment, collect
from moe_lab.failures.results import RESULTS
from moe_lab.sections import ConfigError, suggestion
from moe_lab.train.command import exit_code

NAME, UPDATES = "bugs_64", 150
MOD = ("B03", "B04", "B05", "B06", "B17")
MAMBA = ("B09", "B19")
DAY = (*MOD, *MAMBA, "B10", "B18", "B21", "B24")  # in the code of that day; B08 stands beside them
PLAYERS = {"B01": ("B01",), "B02": ("B02",), "MoD": MOD, "B21": ("B21",)}  # B08 is a gate, and stands apart
OFF = {"MoD off": {"mod_enabled": False}, "Mamba off": {"mamba_enabled": False}}
OFF["both off"] = OFF["MoD off"] | OFF["Mamba off"]


def healthy() -> Config:
    """Every mixture in three layers of width 64, at the rates of profile smoke, held constant after a warm-up."""
    model: dict[str, Any] = {
        "vocab_size": 1024,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 128,
    }
    model |= {"max_seq_len": 64, "dropout": 0.0, "moe_layers": (0, 2), "n_experts": 4, "d_ff_expert": 64}
    model |= {"mamba_layers": (1,), "mod_router_hidden": 0}
    training = {"steps": UPDATES, "batch_size": 8, "gradient_accumulation_steps": 1, "max_lr": 0.02, "warmup_steps": 10}
    training |= {"min_lr_ratio": 1.0, "device": "cpu"}
    config = load_config(ROOT / "configs" / "smoke.yaml")
    return config.with_(model=model, training=training, data={"max_bytes": 2_000_000})


def at_rate(config: Config, lr: float) -> Config:
    """As the case sets its rates: AdamW's is 0.3 of Muon's, on embeddings and heads too."""
    return config.with_(training={"max_lr": lr}, optimizer={"adamw_lr_ratio": 0.3, "embedding_lr_ratio": None})


def arm(bugs: Sequence[str], config: Config | None = None) -> Arm:
    config = config or healthy()
    if "B01" in bugs:
        config = config.with_(precision={"parameters": "bfloat16"})
    if "B02" in bugs:
        config = at_rate(config, 3e-4)
    return Arm(config, bugs=tuple(sorted(set(bugs) - {"B01", "B02"})))


def replayed(changed: Sequence[str], bugs: Sequence[str]) -> Arm:
    """Before the commit: bf16 parameters, Muon at 3e-4, a larger model on longer windows without dropout, MoD and Mamba on. Each
    factor that is `changed` is as after it; MoD and Mamba go off, as the config's own comment says. Staged: sizes are ours."""
    model: dict[str, Any] = {"d_model": 96, "n_heads": 6, "d_ff": 256, "n_layers": 4, "max_seq_len": 128}
    training: dict[str, Any] = {"batch_size": 4}
    if "shape" in changed:
        model, training = {"dropout": 0.1}, {}
    if "mixtures" in changed:
        model |= OFF["both off"]
    config = at_rate(healthy().with_(model=model, training=training), 1e-3 if "rate" in changed else 3e-4)
    return Arm(
        config.with_(precision={"parameters": "float32" if "precision" in changed else "bfloat16"}),
        bugs=tuple(sorted(bugs)),
    )


def arms() -> dict[str, Arm]:
    """By name."""
    made = {"healthy": arm(())} | {id: arm((id,)) for id in ALONE}
    for n in range(2, len(PLAYERS) + 1):
        for players in combinations(PLAYERS, n):
            made[subset_name(players)] = arm([id for player in players for id in PLAYERS[player]])
    made["MoD"] = arm(MOD)
    made["all of that day"] = arm(("B01", "B02", *DAY))
    fixed = at_rate(healthy(), 1e-3)
    for more in ((), ("B08",)):
        bugs, name = (*DAY, *more), " + B08" if more else ""
        made[f"both fixes{name}"] = arm(bugs, fixed)
        for what, off in OFF.items():
            made[f"both fixes{name}, {what}"] = arm(bugs, fixed.with_(model=off))
    made["both fixes, a fitting rate"] = arm(DAY)
    made["both fixes, B21 mended"] = arm([id for id in DAY if id != "B21"], fixed)
    for n in range(len(FACTORS) + 1):
        for changed in combinations(FACTORS, n):
            made[replay_name(changed)] = replayed(changed, DAY)
    for changed in ((), FACTORS, ("precision", "rate")):
        made[replay_name(changed) + " + B08"] = replayed(changed, (*DAY, "B08"))
    return made


def experiment(names: Sequence[str] = ()) -> Experiment:
    """Raises ConfigError for an arm that is not there."""
    known = arms()
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is no arm{suggestion(name, known) or '; `list` names them'}")
    return Experiment(
        name=NAME, arms={name: known[name] for name in names or known}, seeds=(1, 2, 3), evaluate_at=(UPDATES,)
    )


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["list"]:
        print(*arms(), sep="\n")
    elif arguments[:1] == ["run"]:
        print(collect(experiment(arguments[1:]), redo=True, workers=0, progress=False).provenance())
    else:
        results = collect(experiment(), redo=True, workers=1)
        results.save(RESULTS / f"{NAME}.json")
        print(results.provenance())


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
