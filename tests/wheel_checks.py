"""What the wheel of moe_lab/health must do where torch and nothing else is installed: `python -I wheel_checks.py README.md`.

Run by tests/test_health_wheel.py under the suite's torch, by `make health-wheel` under the oldest and newest that it claims.
"""

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

SCRIPT = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
for _ in range(3):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
sys.exit(int(sys.argv[1]))
"""
STRANGERS = ("moe_lab", "numpy", "yaml", "tqdm", "transformers")


def blocks(readme: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def run_example(code: str) -> tuple[str, list[str]]:
    """What it prints, and the findings of its report."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue(), named(printed.getvalue())


def named(output: str) -> list[str]:
    """The findings of a report, as `severity: rule`."""
    return re.findall(r"^(?:error|warning|info): \w+", output, re.MULTILINE)


def the_example_prints_what_the_readme_shows(readme: str) -> None:
    code = blocks(readme, "python")[0]
    shown = next(block for block in blocks(readme, "") if block.startswith("after "))
    printed, findings = run_example(code)
    assert findings == named(shown) == ["error: lost_updates"], printed
    assert printed.splitlines()[:2] == shown.splitlines()[:2], printed  # 60 updates, and the table's columns
    assert "torch.bfloat16" in code
    printed, findings = run_example(code.replace("torch.bfloat16", "torch.float32"))
    assert findings == [] and "no findings" in printed, printed


def a_checkpoint_shows_what_never_moved() -> None:
    from moe_lab_health import inspect_checkpoint, start_sample

    model = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 2))
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    sample = start_sample(model)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "initial_sample": sample}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "x.pt")
        found = inspect_checkpoint(Path(folder) / "x.pt")
        (Path(folder) / "y.pt").write_bytes((Path(folder) / "x.pt").read_bytes()[:999])
        cut = inspect_checkpoint(Path(folder) / "y.pt")
    assert {f.where for f in found if f.severity == "error"} == {"1.weight", "1.bias"}, found
    assert [f.rule for f in cut] == ["unreadable"], cut


def a_config_is_judged() -> None:
    from moe_lab_health import preflight

    config = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "lr": 6e-6, "optimizer": "adamw"}
    assert [f.rule for f in preflight(config)] == ["lr_too_low"]
    try:
        preflight("x.yaml")
    except ValueError as error:
        assert "pip install pyyaml" in str(error), error
    else:
        raise AssertionError("a file was read without PyYAML")


def a_script_is_watched() -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(SCRIPT)
        python = [sys.executable, "-m", "moe_lab_health", "doctor"]
        place = str(Path(importlib.util.find_spec("moe_lab_health").origin).parents[1])
        options = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": place}}
        done = subprocess.run([*python, script, "7"], **options)
        assert (done.returncode, done.stdout) == (7, ""), done
        assert "error: not_in_optimizer" in done.stderr and "after 3 updates: 1 error" in done.stderr, done
        assert subprocess.run([*python, "none.py"], **options).returncode == 2


def every_public_name_is_there() -> None:
    import moe_lab_health

    assert all(callable(getattr(moe_lab_health, name)) or name.isupper() for name in moe_lab_health.__all__)


def the_callback_says_what_it_needs() -> None:
    from moe_lab_health import HealthCallback

    try:
        HealthCallback()
    except ImportError as error:
        assert "pip install 'transformers" in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError("a callback was made without transformers")


class Inherits(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def torchs_private_interfaces_are_there() -> None:
    from moe_lab_health import torch_private as private

    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)  # torch wraps a class's step when it is first made
    optimizer, called = Inherits(model.parameters(), lr=0.1), []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: called.append(private.is_nested_step(o)))
    optimizer.step()
    assert called == [False, True], called  # torch calls the hook twice, and the second time it is told
    with private.without_step_hooks([optimizer]):
        optimizer.step()
    assert len(called) == 2
    optimizer.step()
    assert len(called) == 4

    unconstructed = object.__new__(Inherits)
    assert private.has_step_hooks(optimizer) and not private.has_step_hooks(unconstructed)

    under_way = [private.is_step_under_way()]
    for register in (plain.register_step_pre_hook, plain.register_step_post_hook):
        register(lambda *args: under_way.append(private.is_step_under_way()))
    plain.step()
    assert under_way == [False, True, False], under_way

    everywhere: list = []
    handle = register_optimizer_step_pre_hook(lambda *args: everywhere.append(args))
    before = model.weight.detach().clone()
    private.unhooked_step(type(plain))(plain)
    assert not everywhere and not torch.equal(model.weight, before)
    plain.step()
    assert len(everywhere) == 1
    handle.remove()

    half = [torch.full((9,), 2.0**15, dtype=torch.float16), torch.ones(4, dtype=torch.float16)]
    assert private.norms(half, torch.float32).tolist() == [3 * 2.0**15, 2.0]  # beyond float16
    assert private.norms([torch.ones(4), torch.zeros(2, 2)]).tolist() == [2.0, 0.0]
    heard, scaler = [], torch.amp.GradScaler("cpu", init_scale=8.0)
    with private.backward_heard(heard.append):
        model(torch.ones(1, 2)).sum().backward()
        scaler.scale(model.weight.sum() * 0 + 3).backward()
        torch.autograd.backward([model.bias.sum() * 0 + 5])
        model(torch.ones(3, 2)).backward(torch.ones(3, 2))  # as checkpoints do
    model.bias.sum().backward()
    assert [float(root) for root in heard][1:] == [3.0, 5.0] and scaler.get_scale() == 8.0
    assert private.uncompiled(torch.compile(model)) is model and private.uncompiled(model) is model
    assert private.is_elsewhere(torch.compile(model)) and not private.is_elsewhere(model)
    linear, right, x = nn.Linear(3, 2), nn.Parameter(torch.ones(3, 5)), torch.ones(4, 3)
    assert private.fan_ins(linear(x))[id(linear.weight)] == -1 and private.fan_ins(x @ right) == {id(right): -2}
    assert (private.summed_over(2, 0, []), private.summed_over(2, 1, [])) == (-1, -2)
    ((leaf, node, place, _),) = private.uses(x @ right)
    assert leaf is right and (node.name(), place) == ("MmBackward0", 1)
    assert private.takers(x @ right)[id(right)] == {"MmBackward0"}
    last = nn.Linear(5, 1)
    assert private.nearest_leaves(last((x @ right).relu())[:, 0]) == {id(last.weight), id(last.bias)}
    assert private.behind((x @ right).mT[:, 0].grad_fn).name() == "MmBackward0" and private.behind(None) is None
    transformed: list[bool] = []
    torch.func.vmap(lambda row: transformed.append(private.is_transformed()) or row)(x)
    assert transformed == [True] and not private.is_transformed()
    assert private.made_shape((x @ right).grad_fn) == tuple((x @ right).shape)
    inside: list[bool] = []
    right.register_hook(lambda grad: inside.append(private.is_in_backward()))
    (x @ right).sum().backward()
    assert inside == [True] and not private.is_in_backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    private.meeting_store().set("place", "value")
    assert private.meeting_store().get("place") == b"value"
    dist.destroy_process_group()


def main(readme: Path) -> None:
    present = [name for name in STRANGERS if importlib.util.find_spec(name)]
    assert not present, f"{present} can be imported: this environment says nothing of torch alone"
    torch.set_num_threads(1)
    the_example_prints_what_the_readme_shows(readme.read_text(encoding="utf-8"))
    a_checkpoint_shows_what_never_moved()
    a_config_is_judged()
    a_script_is_watched()
    every_public_name_is_there()
    the_callback_says_what_it_needs()
    torchs_private_interfaces_are_there()
    print(f"torch {torch.__version__}: the wheel does what it says")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
