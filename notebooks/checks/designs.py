"""The tables of runs behind notebooks 03 and 04: which settings, which seeds, how many updates.

The study model is the lab's without its mixtures (dense, attention only), so that its width can change and nothing else
does: four layers, heads of 32, windows of 128 tokens, start values of standard deviation 0.02 as in the case. The learning
rate is constant after 20 updates of warm-up, so that a run of 3200 updates holds the shorter ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from checks.remedies import NAMED, PARTLY, REMEDIES
from moe_lab.config import ROOT, Config, load_config
from moe_lab.failures.experiments import Arm, Experiment

# (Muon's LR, AdamW's LR beside it), Muon in the convention `original`, as the case has it
FAILURE = (3e-4, 9e-5)  # the second run of the case
CURE = (1e-3, 3e-4)  # the report's fix
CENTRE = (4e-3, 1e-2)  # of the surface
# in place of the recipe of configs/lab.yaml, whose training is to be fast
CASE_MODEL = {"zero_init_output": False, "mod_router_hidden": 128}
CASE_OPTIMIZER = {"momentum": 0.95, "betas": (0.9, 0.95), "adamw_lr_ratio": 0.16, "embedding_lr_ratio": None}
POINTS = {"failure": FAILURE, "cure": CURE, "centre": CENTRE}

SWEEP_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SWEEP_ADAMW = 1e-2  # AdamW's LR beside Muon while Muon's is swept


def study_config(d_model: int, compute: str = "bfloat16") -> Config:
    """The study model at a width that is a multiple of 96, with float32 parameters.

    `compute` is bfloat16 as in the case. Two designs, sweep_192 and horizon_96, ask for float32: they were run where a bf16
    product took sixty times as long, before there was `optim.products.RoundedProducts`.
    """
    model = {"d_model": d_model, "n_heads": d_model // 32, "n_kv_heads": d_model // 96, "d_ff": 8 * d_model // 3}
    model |= {"max_seq_len": 128, "moe_layers": (), "mod_enabled": False, "mamba_enabled": False, "mamba_layers": ()}
    training = {"steps": 200, "batch_size": 8, "warmup_steps": 20, "min_lr_ratio": 1.0, "device": "cpu"}
    config = load_config(ROOT / "configs" / "lab.yaml")
    precision = {"compute": compute}
    return config.with_(model=CASE_MODEL | model, training=training, optimizer=CASE_OPTIMIZER, precision=precision)


def with_lrs(
    config: Config, muon: float, adamw: float, convention: str = "original", parameters: str = "float32"
) -> Config:
    """`config` as the case would have it: its start values and optimizers in place of the recipe of configs/lab.yaml,
    Muon's and AdamW's LR set apart from each other; AdamW's holds for embeddings and heads too."""
    muon_type = {"type": "muon", "adjust_lr": convention, "adamw_lr_ratio": adamw / muon}
    return config.with_(
        model=CASE_MODEL,
        training={"max_lr": muon},
        optimizer=CASE_OPTIMIZER | muon_type,
        precision={"parameters": parameters},
    )


def adamw_alone(config: Config, lr: float) -> Config:
    return config.with_(model=CASE_MODEL, training={"max_lr": lr}, optimizer=CASE_OPTIMIZER | {"type": "adamw"})


def sweep(d_model: int, compute: str = "bfloat16") -> Experiment:
    """Each LR in both of Muon's conventions and for AdamW alone: `original 0.01`, `match_rms_adamw 0.01`, `adamw 0.01`."""
    config = study_config(d_model, compute=compute)
    arms = {}
    for lr in SWEEP_LRS:
        for convention in ("original", "match_rms_adamw"):
            arms[f"{convention} {lr:g}"] = Arm(with_lrs(config, lr, SWEEP_ADAMW, convention))
        arms[f"adamw {lr:g}"] = Arm(adamw_alone(config, lr))
    return Experiment(name=f"sweep_{d_model}", arms=arms)


def surface(name: str, config: Config, evaluate_at: Sequence[int] = (200,)) -> Experiment:
    """Muon's LR × AdamW's LR around CENTRE: 3 × 3 in steps of 4, and axial points at 16 (a central composite design)."""
    offsets = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)] + [(-2, 0), (2, 0), (0, -2), (0, 2)]
    lrs = [(CENTRE[0] * 4**i, CENTRE[1] * 4**j) for i, j in offsets]
    arms = {f"{muon:g} {adamw:g}": Arm(with_lrs(config, muon, adamw)) for muon, adamw in lrs}
    return Experiment(name=name, arms=arms, seeds=(0,), evaluate_at=evaluate_at)


def horizon_96() -> Experiment:
    """The surface for 200, 800 and 3200 updates, of 256 tokens each: the longest run then reads no text twice."""
    config = study_config(96, compute="float32").with_(training={"batch_size": 2})
    return surface("horizon_96", config, evaluate_at=(200, 800, 3200))


def attribution(d_model: int) -> Experiment:
    """The three points in float32, in bf16 and in bf16 with fp32 masters, and every corner between failure and each
    other point, so that shares can be taken over all orders of fixing. Arms: `failure → muon of cure, bf16`, …"""
    settings = dict(POINTS)
    for name in ("cure", "centre"):
        settings[f"failure with Muon of {name}"] = (POINTS[name][0], FAILURE[1])
        settings[f"failure with AdamW of {name}"] = (FAILURE[0], POINTS[name][1])
    config, arms = study_config(d_model), {}
    for name, lrs in settings.items():
        cast = with_lrs(config, *lrs, parameters="bfloat16")
        arms |= {f"{name}, float32": Arm(with_lrs(config, *lrs)), f"{name}, bf16": Arm(cast)}
        if name in POINTS:
            arms[f"{name}, masters"] = Arm(cast, remedy=NAMED["masters"])
    return Experiment(name=f"attribution_{d_model}", arms=arms)


def remedies(d_model: int) -> Experiment:
    """Each remedy for bf16 parameters at the report's cure, beside float32 and plain bf16."""
    config = study_config(d_model)
    kept = with_lrs(config, *CURE, parameters="bfloat16")
    arms = {"float32": Arm(with_lrs(config, *CURE)), "bf16": Arm(kept)}
    arms |= {remedy: Arm(kept, remedy=NAMED[remedy]) for remedy in REMEDIES}
    return Experiment(name=f"remedies_{d_model}", arms=arms)


def kept_norms(d_model: int) -> Experiment:
    """The sixth remedy, norms alone in float32, at the report's cure; and at the centre's learning rates under a cosine down to
    0, in which a weight that moved at first stands still once the rate has sunk. Arms: `cure, float32`, `cure, bf16`, …"""
    constant, arms = study_config(d_model), {}
    decaying = constant.with_(training={"min_lr_ratio": 0.0})
    for name, config, lrs in (("cure", constant, CURE), ("decay", decaying, CENTRE)):
        exact = with_lrs(config, *lrs)
        arms |= {f"{name}, float32": Arm(exact), f"{name}, bf16": Arm(with_lrs(config, *lrs, parameters="bfloat16"))}
        arms[f"{name}, norms in float32"] = Arm(exact, remedy=NAMED["norms in float32"])
    return Experiment(name=f"kept_norms_{d_model}", arms=arms)


def kinds() -> Experiment:
    """The lab's model at the learning rates that it had before its training was made fast, the schedule in 200 updates:
    float32, bf16, and bf16 with one kind of tensor in float32, so that what bf16 costs is attributed to kinds."""
    config = load_config(ROOT / "configs" / "lab.yaml", ["training.device=cpu", "precision.compute=bfloat16"])
    optimizer = CASE_OPTIMIZER | {"embedding_lr_ratio": 0.6}
    config = config.with_(model=CASE_MODEL, training={"max_lr": 1e-2}, optimizer=optimizer)
    arms = {"float32": Arm(config), "bf16": Arm(config.with_(precision={"parameters": "bfloat16"}))}
    return Experiment(name="kinds", arms=arms | {name: Arm(config, remedy=NAMED[name]) for name in PARTLY})


def reproduction() -> Experiment:
    """Failure, cure and centre with the lab's own model, every mixture in it, for 200 updates of 2,048 tokens."""
    config = load_config(ROOT / "configs" / "lab.yaml")
    training = {"warmup_steps": 20, "min_lr_ratio": 1.0, "device": "cpu"}
    config = config.with_(training=training, precision={"compute": "bfloat16"})
    arms = {name: Arm(with_lrs(config, *lrs)) for name, lrs in POINTS.items()}
    arms["failure, bf16"] = Arm(with_lrs(config, *FAILURE, parameters="bfloat16"))
    return Experiment(name="reproduction", arms=arms)


def healthy_188() -> Experiment:
    """What a healthy run shows after the first run's 188 updates at its 8,192 tokens each, beside the failure."""
    config = study_config(192).with_(training={"gradient_accumulation_steps": 8})
    arms = {name: Arm(with_lrs(config, *POINTS[name])) for name in ("centre", "cure", "failure")}
    return Experiment(name="healthy_188", arms=arms, seeds=(0,), evaluate_at=(188,))


def all_designs() -> list[Experiment]:
    """Every design of the notebooks, cheapest first; all have committed results."""
    designs = [surface(f"surface_{width}", study_config(width)) for width in (96, 192)]
    designs += [sweep(96), attribution(96), remedies(96), reproduction()]
    designs += [sweep(192, compute="float32"), attribution(192)]
    return [*designs, kept_norms(96), kinds(), healthy_188(), horizon_96()]
