import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import tiny, train

from moe_lab import RunError, Trainer, build_model
from moe_lab.config import from_dict
from moe_lab.train.checkpoint import (
    check_disk,
    checkpoint_bytes,
    initial_sample,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_atomically,
    step_path,
)

KEYS = {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "step", "tokens_seen", "rng_state"}
KEYS |= {"data_state", "config", "initial_sample"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trainer:
    folder = tmp_path_factory.mktemp("run")
    return train(tiny(folder), folder / "run")


def plain(value: object) -> bool:
    """Whether a value holds tensors and plain Python types only."""
    if type(value) is dict:
        return all(type(key) in (str, int) and plain(inner) for key, inner in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return type(value) in (str, int, float, bool, type(None), torch.Tensor)


def test_what_a_checkpoint_holds(run: Trainer) -> None:
    state = torch.load(step_path(run.run_dir, 6), weights_only=True)
    assert set(state) == KEYS
    assert plain({key: dict(value) if key == "model_state_dict" else value for key, value in state.items()})
    assert (state["step"], state["tokens_seen"]) == (6, 6 * 2 * 2 * 16)
    assert from_dict(state["config"]) == run.config
    parameters = dict(run.model.named_parameters())
    assert list(state["model_state_dict"]) == list(parameters)
    assert all(state["model_state_dict"][name].equal(p) for name, p in parameters.items())
    assert [len(part["param_groups"]) for part in state["optimizer_state_dict"]] == [1, 2]  # Muon, AdamW


def test_the_initial_sample_is_that_of_step_0(run: Trainer, tmp_path: Path) -> None:
    start = dict(build_model(run.config.model, run.config.training.seed).named_parameters())
    resumed_config = run.config.with_(training={"steps": 8})
    shutil.copytree(run.run_dir, tmp_path / "copy")
    other = build_model(run.config.model, seed=9)  # a resumed run keeps the first sample, whatever model it is given
    resumed = train(resumed_config, tmp_path / "copy", resume=True, model=other)
    for path in (step_path(run.run_dir, 6), step_path(resumed.run_dir, 8)):
        sample = load_checkpoint(path)["initial_sample"]
        assert sample.keys() == start.keys()
        for name, p in start.items():
            assert sample[name]["value"].equal(p.detach().flatten()[sample[name]["index"]])
            assert len(sample[name]["index"].unique()) == min(p.numel(), 256)


def test_the_sample_is_spread_over_the_tensor() -> None:
    model = torch.nn.Linear(100, 10, bias=False)
    index = initial_sample(model)["weight"]["index"]
    assert len(index) == 256 and index.dtype == torch.int64 and index[-1] > 700


def test_the_newest_are_kept(run: Trainer, tmp_path: Path) -> None:
    assert sorted(path.name for path in (run.run_dir / "checkpoints").iterdir()) == ["step_000003.pt", "step_000006.pt"]
    (tmp_path / "checkpoints").mkdir()
    names = [
        "step_000009.pt",
        "step_000010.pt",
        "step_000100.pt",
        "step_001000.pt",
        "checkpoint_interrupted.pt",
        "my.pt",
    ]
    for name in names:
        (tmp_path / "checkpoints" / name).touch()
    prune(tmp_path, keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(names[2:])


def test_a_million_steps_are_newer_than_fewer(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (998_000, 999_000, 1_000_000, 24_000_000):  # the last one is near the case's planned run
        step_path(tmp_path, step).touch()
    prune(tmp_path, keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_1000000.pt", "step_24000000.pt"}


def test_a_run_keeps_as_many_as_it_is_told(tmp_path: Path) -> None:
    train(tiny(tmp_path, training={"steps": 4, "save_interval": 1, "keep_checkpoints": 1}), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_000004.pt"]


def test_a_crash_in_the_middle_of_a_save_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "step_000001.pt"
    save_atomically({"step": 1}, path)

    def half(state: dict, file) -> None:
        file.write(b"half of a checkpoint")
        raise OSError("no space left on device")

    with monkeypatch.context() as crash:
        crash.setattr(torch, "save", half)
        with pytest.raises(OSError, match="no space"):
            save_atomically({"step": 2}, path)
    assert load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.glob("*.pt")) == [path], "what is left of the crash must not look like a checkpoint"
    save_atomically({"step": 3}, path)
    assert load_checkpoint(path) == {"step": 3} and os.listdir(tmp_path) == [path.name]


def test_a_broken_checkpoint_is_passed_over_and_named(run: Trainer, tmp_path: Path, capsys) -> None:
    shutil.copytree(run.run_dir, tmp_path / "run")
    newest = step_path(tmp_path / "run", 6)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    path, state, broken = latest_checkpoint(tmp_path / "run")
    assert path == step_path(tmp_path / "run", 3) and state["step"] == 3
    assert len(broken) == 1 and broken[0].startswith(f"{newest}: not a whole checkpoint") and "\n" not in broken[0]
    resumed = train(run.config, tmp_path / "run", resume=True)
    assert str(newest) in capsys.readouterr().err
    assert resumed.step == 6 and load_checkpoint(newest)["step"] == 6


def test_the_highest_step_wins_whatever_the_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    steps = {"step_000009.pt": 9, "checkpoint_interrupted.pt": 11, "step_000010.pt": 10, "foreign.pt": None}
    for name, step in steps.items():
        save_atomically({"step": step} if step else {"weights": 1}, tmp_path / "checkpoints" / name)
    path, state, broken = latest_checkpoint(tmp_path)
    assert path.name == "checkpoint_interrupted.pt" and state["step"] == 11
    assert broken == [f"{tmp_path}/checkpoints/foreign.pt: holds no step; left alone"]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"nothing to resume from, checkpoints/ holds no whole checkpoint; start in a new"
    ):
        latest_checkpoint(tmp_path)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"step": 1, "payload": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(
        RunError, match=r"bad.pt: not a whole checkpoint \(UnpicklingError: .*; use another one$"
    ) as caught:
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists() and "\n" not in str(caught.value)


def test_the_estimate_covers_a_checkpoint_and_little_more(run: Trainer, tmp_path: Path) -> None:
    assert step_path(run.run_dir, 6).stat().st_size <= checkpoint_bytes(run.model, run.optimizers)
    model = torch.nn.Linear(2000, 1000)  # large beside what an estimate adds for small things
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2000)).sum().backward()
    optimizer.step()
    save_atomically({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
    size = (tmp_path / "c.pt").stat().st_size
    assert size <= checkpoint_bytes(model, [optimizer]) < 1.1 * size


def test_check_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_disk(tmp_path, 1)
    with pytest.raises(
        RunError, match=r"a checkpoint needs .* GB and the disk has .* GB free; free some space, or lower"
    ):
        check_disk(tmp_path, 2 * free)
