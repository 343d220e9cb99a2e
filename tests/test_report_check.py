from pathlib import Path

import pytest
import torch

from moe_lab import RunError, Trainer, load_run
from moe_lab.train.checkpoint import step_path


@pytest.fixture
def run_dir(run: Trainer) -> Path:
    return run.run_dir


def test_the_check_of_the_report_runs_unchanged(run_dir: Path, capsys) -> None:
    path = str(step_path(run_dir, 6))
    # from here on as the report has it
    cp = torch.load(path, map_location="cpu")
    for name, p in cp["model_state_dict"].items():
        if "layers.0.seq_norm.weight" in name:
            print(f"{name}: {p.float().mean()}")
    name, mean = capsys.readouterr().out.strip().split(": ")
    assert name == "layers.0.seq_norm.weight"
    assert 0 < abs(float(mean) - 1) < 0.1, "should be moving away from 1.0"


def test_three_lines_to_text(run_dir: Path) -> None:
    model, tokenizer = load_run(run_dir)
    text = model.generate("abc ", 8, tokenizer=tokenizer)
    assert text.startswith("abc ") and len(text) > 4
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    stored = torch.load(step_path(run_dir, 6), weights_only=True)["model_state_dict"]
    assert all(p.equal(stored[name]) for name, p in model.named_parameters())


def test_a_run_without_its_tokenizer(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(run_dir / "checkpoints")
    with pytest.raises(RunError, match=r"tokenizer.json: no such file; it belongs beside the checkpoints of a run$"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="holds no whole checkpoint"):
        load_run(tmp_path / "nowhere")
