"""Checks of notebook 05's exercises. Solutions: notebooks/solutions/05.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import nn

from checks.exercise import exercise
from moe_lab.config import ROOT
from moe_lab.health.before.preflight import preflight

REPORTED = ROOT / "configs" / "training_1.5b_as_reported.yaml"


def patient() -> tuple[nn.Sequential, torch.optim.Optimizer, torch.Tensor]:
    """A model, its optimizer, and token ids to train on: a loop with them runs without an error, and something is wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 32), nn.RMSNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 48))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        model[4] = nn.Linear(32, 64)  # the vocabulary grew after the optimizer was made
        start = torch.randint(64, (256, 1))
    ids = (start + 3 * torch.arange(17)) % 64  # (256, 17): each token follows from the one before
    return model, optimizer, ids


@exercise
def check_diagnosis(diagnosis: tuple[str, str]) -> None:
    """The rule that names the patient's fault, and one tensor that has it."""
    assert isinstance(diagnosis, tuple) and len(diagnosis) == 2, "a pair of texts: (rule, tensor)"
    rule, tensor = diagnosis
    assert rule != "no_gradient", "gradients do arrive there: print them. What is done with them?"
    assert rule not in ("frozen_tensor", "loss_not_falling"), (
        "that is what follows from it; the first finding is the cause"
    )
    assert rule == "not_in_optimizer", (
        "read the rule id of the first error in watch.findings: it stands after the severity"
    )
    assert tensor in ("4.weight", "4.bias"), "the tensor's name stands in the finding, as in model.named_parameters()"


@exercise
def check_edits(edits: Mapping[str, Any]) -> None:
    """Changes of the reported config, `section.key` → value, after which preflight has neither error nor warning."""
    assert isinstance(edits, Mapping) and edits, "a mapping such as {'training.max_lr': 0.001}"
    config = yaml.safe_load(REPORTED.read_text(encoding="utf-8"))
    for name, value in edits.items():
        section, _, key = name.partition(".")
        assert key in config.get(section, ()), (
            f"{name} is no key of the file; write section.key, such as training.max_lr"
        )
        config[section][key] = value
    kept = {"model", "data"}
    assert not kept & {name.partition(".")[0] for name in edits}, (
        "the model and the data stay as they are: mend how they train"
    )
    left = [finding for finding in preflight(config) if finding.severity != "info"]
    assert not left, f"preflight still says: {left[0].severity}: {left[0].rule}: {left[0].message}"


@exercise
def check_still(kinds: set[str], path: Any) -> None:
    """Last parts of the names (such as `seq_norm.weight`) of RMSNorm tensors that a checkpoint holds exactly at 1."""
    state = torch.load(path, map_location="cpu", weights_only=True)["model_state_dict"]
    norms = {name for name in state if name.endswith("norm.weight")}
    still = {
        name.split(".", 2)[-1] if name.startswith("layers.") else name for name in norms if (state[name] == 1).all()
    }
    assert isinstance(kinds, (set, list, tuple)) and kinds, "a set of texts, such as {'seq_norm.weight', …}"
    others = set(kinds) - {name.split(".", 2)[-1] if name.startswith("layers.") else name for name in norms}
    assert not others, f"{sorted(others)[0]} is no norm's name: they end in norm.weight"
    assert not set(kinds) - still, f"{sorted(set(kinds) - still)[0]} has moved in this checkpoint"
    assert set(kinds) == still, f"{len(still - set(kinds))} more kind of norm stands still: a model has more than one"
