import io
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks.remedies import REMEDIES
from helpers import refused
from tiny_run import contents, tiny, train

from moe_lab import RunError, Trainer, build_model
from moe_lab.config import from_dict
from moe_lab.health.sampling import start_sample
from moe_lab.optim import build_optimizers
from moe_lab.train import read_record
from moe_lab.train.checkpoint import (
    checkpoint_bytes,
    latest_checkpoint,
    load_checkpoint,
    prune,
    save_atomically,
    step_path,
)

KEYS = {"model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "step", "tokens_seen", "rng_state"}
KEYS |= {"data_state", "config", "initial_sample"}


@pytest.fixture
def copied(run: Trainer, tmp_path: Path) -> Path:
    """The run's directory, to change and to train on in."""
    return shutil.copytree(run.run_dir, tmp_path / "run")


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


def test_the_initial_sample_is_that_of_step_0(run: Trainer, copied: Path) -> None:
    expected = start_sample(build_model(run.config.model, run.config.training.seed))
    other = build_model(run.config.model, seed=9)  # a resumed run keeps the first sample, whatever model it is given
    resumed = train(run.config.with_(training={"steps": 8}), copied, resume=True, model=other)
    for path in (step_path(run.run_dir, 6), step_path(resumed.run_dir, 8)):
        sample = load_checkpoint(path)["initial_sample"]
        assert sample.keys() == expected.keys()
        assert all(sample[name][key].equal(t) for name, kept in expected.items() for key, t in kept.items())


@pytest.mark.parametrize(
    ("steps", "others"),
    [
        ((9, 10, 100, 1000), ["checkpoint_interrupted.pt", "my.pt"]),
        ((998_000, 999_000, 1_000_000, 24_000_000), []),  # the last one is near the case's planned run
    ],
)
def test_the_newest_are_kept(tmp_path: Path, steps: tuple, others: list) -> None:
    names = [*(step_path(tmp_path, step).name for step in steps), *others]
    (tmp_path / "checkpoints").mkdir()
    for name in names:
        (tmp_path / "checkpoints" / name).touch()
    prune(tmp_path, keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(names[2:])


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


def test_a_broken_checkpoint_is_passed_over_and_named(run: Trainer, copied: Path, capsys) -> None:
    newest = step_path(copied, 6)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    path, state = latest_checkpoint(copied)
    assert path == step_path(copied, 3) and state["step"] == 3
    assert re.fullmatch(rf"{newest}: not a whole checkpoint .*; use another one\n", capsys.readouterr().err)
    resumed = train(run.config, copied, resume=True)
    assert str(newest) in capsys.readouterr().err
    assert resumed.step == 6 and load_checkpoint(newest)["step"] == 6


def test_the_highest_step_wins_whatever_the_name(tmp_path: Path, capsys) -> None:
    (tmp_path / "checkpoints").mkdir()
    steps = {"step_000009.pt": 9, "checkpoint_interrupted.pt": 11, "step_000010.pt": 10, "foreign.pt": None}
    for name, step in steps.items():
        save_atomically({"step": step} if step else {"weights": 1}, tmp_path / "checkpoints" / name)
    path, state = latest_checkpoint(tmp_path)
    assert path.name == "checkpoint_interrupted.pt" and state["step"] == 11
    assert capsys.readouterr().err == f"{tmp_path}/checkpoints/foreign.pt: holds no step; left alone\n"


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"step": 1, "payload": Payload()}, tmp_path / "bad.pt")
    with refused(RunError, match=r"bad.pt: not a whole checkpoint \(UnpicklingError: .*; use another one$") as caught:
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists() and "\n" not in str(caught.value)


def test_the_estimate_covers_a_checkpoint_and_little_more(run: Trainer, tmp_path: Path) -> None:
    """Of an optimizer that has stepped: AdamW, and one that keeps more than was to be expected."""
    assert step_path(run.run_dir, 6).stat().st_size <= checkpoint_bytes(run.model, run.optimizers)
    model = torch.nn.Linear(2000, 1000)  # large beside what an estimate adds for small things
    optimizer = torch.optim.AdamW(model.parameters())
    for n_more in (0, 3):
        for p in model.parameters():
            kept = {f"kept_{i}": torch.zeros_like(p) for i in range(n_more)}
            optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), **kept}
        save_atomically({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt")
        size = (tmp_path / "c.pt").stat().st_size
        assert size <= checkpoint_bytes(model, [optimizer]) < 1.1 * size


@pytest.mark.parametrize("remedy", ["plain", *REMEDIES])
def test_the_estimate_is_an_upper_bound_for_every_remedy(tmp_path: Path, remedy: str) -> None:
    """Before the first step, when the disk is checked, and after it, against the bytes of what is then saved."""
    config = tiny(tmp_path, model={"vocab_size": 4000, "d_model": 64, "d_ff": 256})
    model = build_model(config.model)
    make = REMEDIES.get(remedy, lambda model, *given: build_optimizers(model.bfloat16(), *given))
    optimizers = make(model, config.optimizer, 0.01)
    before = checkpoint_bytes(model, optimizers)
    sum(model.losses(torch.randint(4000, (2, 17))).values()).backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    sample = start_sample(model)
    save_atomically({"model": model.state_dict(), "optimizer": states, "sample": sample}, tmp_path / "c.pt")
    size = (tmp_path / "c.pt").stat().st_size
    assert size <= before and size <= checkpoint_bytes(model, optimizers)
    assert size > 4 * (1 << 20), "large beside what an estimate adds for small things"


def test_where_folders_cannot_be_opened_a_checkpoint_is_written_all_the_same(tmp_path: Path, monkeypatch) -> None:
    """Windows: os.open of a folder is a PermissionError there."""

    def as_on_windows(place, *options):
        raise PermissionError(13, "Permission denied", str(place))

    with monkeypatch.context() as windows:
        windows.setattr(os, "open", as_on_windows)
        save_atomically({"step": 1}, tmp_path / "step_000001.pt")
    assert load_checkpoint(tmp_path / "step_000001.pt") == {"step": 1}


# ---- what counts as damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        OSError(116, "Stale file handle"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_file_that_cannot_be_read_stops_and_cuts_nothing(run: Trainer, copied: Path, monkeypatch, error) -> None:
    before = contents(copied)
    load = torch.load

    def fails_at_the_newest(file, **options):
        if file.name.endswith("step_000006.pt"):
            raise error
        return load(file, **options)

    monkeypatch.setattr(torch, "load", fails_at_the_newest)
    with refused(RunError, match=rf"^.*step_000006.pt: cannot be read \({type(error).__name__}: .*\); mend"):
        Trainer(run.config, copied, resume=True)
    assert contents(copied) == before


def test_a_disk_that_fails_is_no_damaged_file(run: Trainer, monkeypatch) -> None:
    """Wherever in the file it fails: torch's own reader says the same of both."""
    path = step_path(run.run_dir, 6)
    monkeypatch.setattr(Path, "open", lambda path, mode: BadDisk(path))
    for left in (0, 1, 20):
        BadDisk.left = left
        with refused(RunError, match=r"cannot be read \(OSError: .*Input/output error"):
            load_checkpoint(path)


class BadDisk(io.FileIO):
    """Reads `left` times."""

    def readinto(self, buffer):
        BadDisk.left -= 1
        if BadDisk.left < 0:
            raise OSError(5, "Input/output error")
        return super().readinto(buffer)

    def read(self, size=-1):
        data = bytearray(size)
        return bytes(data[: self.readinto(data)])


def test_a_resume_reads_one_checkpoint_once(run: Trainer, copied: Path, monkeypatch) -> None:
    old = load_checkpoint(step_path(run.run_dir, 3))
    save_atomically(old, copied / "checkpoints" / "checkpoint_interrupted.pt")
    read, load = [], torch.load

    def noted(file, **options):
        state = load(file, **options)
        held = [p for p in state["model_state_dict"].values() if p.device.type != "meta"]
        read.append((Path(file.name).name, sum(p.nbytes for p in held)))
        return state

    monkeypatch.setattr(torch, "load", noted)
    assert train(run.config.with_(training={"steps": 7}), copied, resume=True).step == 7
    n_bytes = sum(p.nbytes for p in run.model.state_dict().values())
    assert read == [("checkpoint_interrupted.pt", 0), ("step_000006.pt", n_bytes)]


def test_a_used_directory_names_both_ways_out(tmp_path: Path) -> None:
    """Whether it was used before the trainer was made or since: by another one, or in a `fit` of its own."""
    config = tiny(tmp_path, training={"steps": 2})
    trainer = train(config.with_(training={"steps": 1}), tmp_path / "run")
    one, other = (Trainer(config, tmp_path / "run", resume=True) for _ in range(2))
    one.fit()
    before = read_record(tmp_path / "run")
    for attempt in (lambda: Trainer(config, tmp_path / "run"), trainer.fit, one.fit, other.fit):
        with refused(RunError, match=r"run: holds a run already; .*resume=True .*, or take another directory$"):
            attempt()
    assert read_record(tmp_path / "run") == before


def test_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    trainer = Trainer(tiny(tmp_path), tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(trainer.model, "report", lambda ids, generator: pytest.fail("training began"))
    expected = r"run: a checkpoint needs 0.00 GB and the disk has 0.00 GB free; free some space, or lower"
    with refused(RunError, match=expected):
        trainer.fit()
    assert read_record(tmp_path / "run") == []
