"""Files that are no checkpoints, or that the machine cannot read: one line, and nothing in them is run."""

import errno
import os
from pathlib import Path

import pytest
import torch

from moe_lab import Trainer, health
from moe_lab.health.after.inspection import inspect_checkpoint
from moe_lab.train.checkpoint import step_path


def unreadable(path: Path) -> str:
    (finding,) = inspect_checkpoint(path)
    assert (finding.rule, finding.severity, finding.where) == ("unreadable", "error", str(path))
    assert "\n" not in str(finding)
    return finding.message.removeprefix("not a checkpoint that can be inspected: ")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file(run: Trainer, tmp_path: Path, share: float, zipped: bool) -> None:
    whole = tmp_path / "whole.pt"
    torch.save(torch.load(step_path(run.run_dir, 6), weights_only=True), whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(share * len(content))])
    assert unreadable(tmp_path / "cut.pt").startswith("it is cut short, damaged, or no file of torch.save (")
    (tmp_path / "text.pt").write_text("model:\n  d_model: 3\n")
    assert unreadable(tmp_path / "text.pt").startswith("it is cut short, damaged")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    state = {"model_state_dict": {"a": torch.ones(3)}, "payload": Payload()}
    torch.save(state, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    assert unreadable(tmp_path / "bad.pt").startswith("it asks for posix.mkdir, no plain value: reading it could run")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "bad.pt", weights_only=False)  # the payload is a real one
    assert (tmp_path / "executed").exists()


NAMELESS = [[1, 2], {"a": 1}, {"model": {}}, torch.ones(3), None, {"state_dict": [torch.ones(3)]}]


@pytest.mark.parametrize("content", NAMELESS)
def test_a_file_without_named_tensors(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "f.pt")
    assert unreadable(tmp_path / "f.pt").startswith("it holds no tensors by name")


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to all"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError(NO_MEMORY), "not enough memory"),
        (RuntimeError("unable to mmap 8 bytes from file <f>: Cannot allocate memory (12)"), "not enough memory"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_machine_cannot_do_is_not_the_files_fault(run: Trainer, monkeypatch, error, reason: str) -> None:
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(ValueError) as caught:
        inspect_checkpoint(step_path(run.run_dir, 6))
    assert str(caught.value) == f"{step_path(run.run_dir, 6)}: cannot be read: {reason}"


def test_the_processs_warnings_are_left_alone() -> None:
    """`warnings.catch_warnings` changes them for every thread, and a training may run in another."""
    sources = [path.read_text() for path in Path(health.__file__).parent.rglob("*.py")]
    assert len(sources) > 10 and not any("catch_warnings" in source for source in sources)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.pt: no such file; give the path of a checkpoint$"):
        inspect_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r": is a folder; give the path of a checkpoint$"):
        inspect_checkpoint(tmp_path)
