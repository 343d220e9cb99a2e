"""The case at its own size, tried small: a stopped run goes on bit for bit, and moments in files change no number."""

from pathlib import Path

import pytest
import torch

from benchmarks import true_size
from moe_lab.config import Config
from moe_lab.train import Trainer


def small(parameters: str, updates: int) -> Config:
    """The narrow copy made shorter, too: one layer of each kind."""
    config = true_size.size_config(96, parameters, updates)
    layers = {"n_layers": 3, "moe_layers": (1,), "mamba_layers": (2,), "max_seq_len": 64, "vocab_size": 2048}
    return config.with_(model=layers, data={"source": "stdlib", "max_bytes": 400_000})


@pytest.fixture(autouse=True)
def _no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(true_size, "planned", lambda config: {})
    monkeypatch.setattr(true_size, "guard", lambda: None)


def test_the_true_size_is_the_case() -> None:
    config = true_size.size_config()
    model, training = config.model, config.training
    assert (model.d_model, model.d_ff, model.d_ff_expert, model.n_layers, model.vocab_size) == (
        1536,
        4096,
        2048,
        20,
        50257,
    )
    assert config.tokens_per_step == 4096 and training.max_lr == 3e-4
    assert training.max_lr * config.optimizer.adamw_lr_ratio == pytest.approx(9e-5)
    narrow = true_size.size_config(384)
    assert narrow.training.max_lr == pytest.approx(1.5e-4)  # half the step of an element at four times the width
    assert narrow.training.max_lr * narrow.optimizer.adamw_lr_ratio == pytest.approx(9e-5)


@pytest.mark.parametrize("parameters", ["bfloat16", "float32"])
def test_a_run_goes_on_where_it_stopped(tmp_path: Path, parameters: str) -> None:
    whole = true_size.run(small(parameters, 4), tmp_path / "whole", 2)
    true_size.run(small(parameters, 2), tmp_path / "parts", 1)
    parts = true_size.run(small(parameters, 4), tmp_path / "parts", 2)
    assert [row["loss"] for row in parts["updates"]] == [row["loss"] for row in whole["updates"]]
    assert [row["step"] for row in parts["updates"]] == [1, 2, 3, 4]
    moved = [row["norm_deviation"] for row in whole["updates"]]
    assert all(d == 0 for d in moved) if parameters == "bfloat16" else all(d > 0 for d in moved)


def test_moments_in_files_change_no_number(tmp_path: Path) -> None:
    config = small("float32", 3)
    mapped = true_size.run(config, tmp_path / "mapped", 9)
    model = true_size.build_model(config.model, 0)
    trainer = Trainer(config, tmp_path / "plain", model=model)
    plain = [sum(term.item() for term in report.losses.values()) for report in trainer.steps()]
    assert [row["loss"] for row in mapped["updates"]] == pytest.approx(plain, abs=0)
    assert any((tmp_path / "mapped" / "moments").iterdir())


def test_nothing_is_measured_without_a_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(true_size, "RESULT", tmp_path / "none.json")
    with pytest.raises(true_size.ConfigError, match="no prediction yet"):
        true_size.measure("case", 1)


def test_the_expected_first_loss() -> None:
    assert true_size.expected_loss(true_size.size_config()) == pytest.approx(
        torch.tensor(50257.0).log().item() + 0.3072, abs=1e-5
    )
