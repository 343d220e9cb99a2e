"""A script that knows nothing of the watch, under `doctor`; and what a watch says by itself, when and where."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from toy import adamw, loss_of, toy, train, watched

from moe_lab.__main__ import main
from moe_lab.health import Watch
from moe_lab.health.during.doctor import command

HEAD = """
import sys, torch
from torch import nn
torch.manual_seed(0)
V = 64
def net():
    return nn.Sequential(nn.Embedding(V, 16), nn.RMSNorm(16), nn.Linear(16, V, bias=False))
def loss_of(model):
    ids = torch.randint(V, (8, 16))
    return nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ((7 * ids + 3) % V).flatten())
model = net()
"""
PLAIN = """
if "bf16" in sys.argv:
    model.bfloat16()
if "twice" in sys.argv:
    model.append(nn.Softmax(-1))
half = list(model.parameters())[:-1] if "half" in sys.argv else model.parameters()
optimizer = torch.optim.AdamW(half, lr=1e-2, weight_decay=0.0)
for _ in range(40):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
print("done", sys.argv[1:], __name__)
sys.exit(3)
"""
ACCUMULATED = """
optimizers = [torch.optim.SGD(model[:2].parameters(), lr=1e-2), torch.optim.AdamW(model[2].parameters(), lr=1e-2, weight_decay=0.0)]
for _ in range(30):
    for _ in range(4):
        (loss_of(model) / (1 if "summed" in sys.argv else 4)).backward()
    for o in optimizers:
        o.step()
        o.zero_grad()
"""
CLOSURE = """
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
def closure():
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss
for _ in range(12):
    optimizer.step(closure)
"""
SCALED = """
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for _ in range(560 if "skips" in sys.argv else 40):
    loss = loss_of(model)
    scaler.scale(loss).backward()
    if "skips" in sys.argv:
        model[2].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
"""
TWO = """
other = net()
pairs = [(m, torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0)) for m in (model, other)]
for i in range(30):
    for m, o in pairs if "together" in sys.argv else pairs[i // 15 :][:1]:
        o.zero_grad()
        loss_of(m).backward()
        o.step()
"""
ACCELERATE = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
if "half" in sys.argv:
    optimizer = torch.optim.AdamW(model[:2].parameters(), lr=1e-2, weight_decay=0.0)
else:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
model, optimizer = accelerator.prepare(model, optimizer)
for _ in range(60):
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(model))
        optimizer.step()
        optimizer.zero_grad()
"""
TRAINER = """
import tempfile, transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=16))
rows = [{"input_ids": x, "labels": x} for x in ((7 * torch.arange(16) + i) % V for i in range(64))]
options = dict(max_steps=24, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2, disable_tqdm=True)
Trainer(model, TrainingArguments(tempfile.mkdtemp(), **options), train_dataset=rows).train()
"""


@pytest.fixture
def doctor(tmp_path: Path, monkeypatch, capsys):
    """Runs a script in this process: its exit code, what went to stdout, what to stderr."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(script: str, *arguments: str) -> tuple[object, str, str]:
        (tmp_path / "train.py").write_text(HEAD + script)
        try:
            code = command(["doctor", str(tmp_path / "train.py"), *arguments])
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def test_a_script_is_watched_and_keeps_its_arguments_its_output_and_its_exit_code(doctor) -> None:
    code, out, err = doctor(PLAIN, "healthy", "--lr", "3")
    assert (code, out) == (3, "done ['healthy', '--lr', '3'] __main__\n")
    watching, last = err.splitlines()
    assert watching == "doctor: watching Sequential under AdamW"
    assert last.startswith("after 40 updates: 0 errors, 0 warnings, 0 info; not checked: ")
    assert "the loss" not in last  # the roots of the backward passes were observed
    for sickness, words in (
        ("bf16", "warning: lost_updates: "),
        ("half", "error: not_in_optimizer: "),
        ("twice", "warning: squashed_twice: "),
    ):
        code, _, err = doctor(PLAIN, sickness)
        assert code == 3 and words in err, err


def test_losses_are_those_of_an_update(doctor) -> None:
    assert "0 errors, 0 warnings" in (err := doctor(ACCUMULATED)[2]), err
    assert "doctor: watching Sequential under SGD, AdamW" in err and "after 30 updates" in err
    assert "4 times" in (err := doctor(ACCUMULATED, "summed")[2]), err
    assert "initial_loss" not in (err := doctor(CLOSURE)[2]) and "after 12 updates" in err, err
    assert "initial_loss" not in (err := doctor(SCALED)[2]) and "after 40 updates" in err, err


def test_a_training_without_updates_is_no_all_clear(doctor) -> None:
    assert "error: no_updates: 50 losses and not one update since" in (err := doctor(SCALED, "skips")[2]), err
    assert "doctor: no optimizer of torch made a step: nothing was watched" in doctor("loss_of(model).backward()")[2]


def test_several_models(doctor) -> None:
    err = doctor(TWO)[2]  # one after the other: the first may go
    assert err.count("after 15 updates: 0 errors, 0 warnings") == 2, err
    err = doctor(TWO, "together")[2]
    assert "doctor: not checked: the losses: of several models" in err and err.count("doctor: watching") <= 3, err


def test_accelerate_and_trainer(doctor) -> None:
    assert "after 30 updates: 0 errors, 0 warnings" in (err := doctor(ACCELERATE)[2]), err
    assert "error: not_in_optimizer" in (err := doctor(ACCELERATE, "half")[2]), err
    err = doctor(TRAINER)[2]
    assert "watching GPT2LMHeadModel under AdamW" in err and "after 24 updates: 0 errors" in err, err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "doctor takes a script and its arguments"),
        (["-x"], "doctor takes a script and its arguments"),
        (["none.py"], "none.py: no such file; doctor takes"),
        (["."], ".: is a folder; doctor takes"),
        (["-m", "no.such"], "no.such: no such module"),
        (["-m"], "doctor takes a script"),
    ],
    ids=" ".join,
)
def test_wrong_words(argv: list[str], expected: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["doctor", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {expected}") and err.count("\n") == 1


def test_a_module_an_error_of_the_script_and_ctrl_c(tmp_path: Path) -> None:
    """In a process of its own: a traceback is the script's, the report comes all the same, Ctrl-C ends it as it would."""
    root = str(Path(__file__).parents[1])
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "fit.py").write_text(HEAD + PLAIN.replace("sys.exit(3)", "1 / 0"))
    (tmp_path / "endless.py").write_text(HEAD + PLAIN.replace("range(40)", "iter(lambda: print('up', flush=True), 1)"))
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": root}, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    python = [sys.executable, "-m", "moe_lab.health", "doctor"]
    failed = subprocess.run([*python, "-m", "package.fit", "a"], **options, timeout=100)
    assert (failed.returncode, failed.stdout) == (1, "done ['a'] __main__\n")
    assert "after 40 updates" in failed.stderr and failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs start deaf to it
    endless = subprocess.Popen([*python, "endless.py"], **options, preexec_fn=heard)
    for _ in range(20):  # updates
        assert endless.stdout.readline() == "up\n"
    endless.send_signal(signal.SIGINT)
    _, err = endless.communicate(timeout=100)
    assert endless.returncode == -signal.SIGINT and "KeyboardInterrupt" in err and "\nafter " in err


# ---- what a watch says by itself -------------------------------------------------------------------------------------


def test_a_finding_is_told_when_it_is_made_and_what_was_not_checked_at_the_end(capsys) -> None:
    model = toy(dtype=torch.bfloat16)
    watch = Watch(model, adamw(model, lr=1e-3))
    train(watch, model, watch.state.optimizers, 25)
    told = capsys.readouterr().err
    assert "lost_updates" in told and told.splitlines() == [str(f) for f in watch.findings]
    watch.report()
    assert "\nnot checked: what only a changed input" in capsys.readouterr().out
    watch.close()
    last = capsys.readouterr().err
    assert last.startswith("after 25 updates: ") and last.count("\n") == 1
    watch.close()
    assert capsys.readouterr().err == ""


def test_quiet_is_quiet(capsys) -> None:
    model = toy()
    watch = Watch(model, adamw(model, lr=1e9), quiet=True)
    train(watch, model, watch.state.optimizers, 25)
    watch.close()
    assert watch.findings and capsys.readouterr().err == ""


def test_a_closed_stderr_ends_nothing(monkeypatch, tmp_path: Path) -> None:
    with (tmp_path / "err").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
    model = toy(dtype=torch.bfloat16)
    assert [f.rule for f in watched(model, adamw(model, lr=1e-3)).findings if f.severity == "error"] == ["lost_updates"]


def test_what_was_not_judged_is_named_with_its_reason(capsys) -> None:
    model = torch.nn.Linear(2, 1)
    with Watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as watch:
        model(torch.ones(1, 2)).sum().backward()
        watch.state.optimizers[0].step()
    last = capsys.readouterr().err
    for words in ("some rules wait for 20", "none was observed", "known of language models alone"):
        assert words in last
    model = toy()
    with Watch(model, adamw(model), start_step=5) as watch:
        watch.observe(loss=loss_of(model, 0))
    assert "everything (no update was seen)" in capsys.readouterr().err
