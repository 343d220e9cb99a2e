"""Parameter counts against a real model, arithmetic by hand, and the case's own figure."""

from pathlib import Path

import pytest
from helpers import MECHANISMS, tiny

from moe_lab import build_model, load_config
from moe_lab.model import count_parameters

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_total_is_that_of_a_real_model(mechanism: str) -> None:
    config = tiny(**MECHANISMS[mechanism])
    assert count_parameters(config).total == sum(p.numel() for p in build_model(config).parameters())


def test_a_dense_model_is_all_active() -> None:
    for mechanism in ("attention", "mamba", "routing_mamba"):  # every expert of a Routing Mamba scans every token
        count = count_parameters(tiny(**MECHANISMS[mechanism]))
        assert count.active == count.active_with_depth == count.total


def test_active_parameters_by_hand() -> None:
    """Two layers, the second with 4 experts of which 1 works; MoD computes half of the tokens of each sublayer."""
    changes = {"moe_layers": (1,), "moe_top_k": 1, "n_pred_tokens": 1, "aux_loss_weights": (1.0,)}
    config = tiny(**changes, mod_enabled=True, mod_capacity_factor=0.5)
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # q; k and v, with 2 of 4 heads; o
    dense, expert, router = 3 * 16 * 24, 3 * 16 * 16, 16 * 8 + 8 * 4
    depth = 2 * (16 * 8 + 8 * 1)  # a router and a predictor for each sublayer
    outside = 257 * 16 + 16 + 257 * 16  # embedding, final norm, head
    sublayers = [16 + attention, 16 + dense, 16 + attention, 16 + router + expert]  # with their norms
    count = count_parameters(config)
    assert count.total == outside + sum(sublayers) + 3 * expert + 4 * depth
    assert count.active == outside + sum(sublayers) + 4 * depth
    assert count.active_with_depth == outside + sum(sublayers) / 2 + 4 * depth  # the router looks at every token


def test_the_case_has_its_1_49_billion() -> None:
    config = load_config(CONFIGS / "training_1.5b.yaml").model
    count = count_parameters(config)
    model = build_model(config, device="meta")
    predictors = sum(p.numel() for name, p in model.named_parameters() if "predictor" in name)
    assert round((count.total - predictors) / 1e9, 2) == 1.49  # the case's model has no predictors
    assert round(count.total / 1e9, 2) == 1.50
    assert all(p.is_meta for p in model.parameters())
    assert count.active < 0.75 * count.total
