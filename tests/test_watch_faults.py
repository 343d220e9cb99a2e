"""Whatever fails inside the watch, the training goes on to the same weights, and a finding says so.

Every function of the package that a watched training reaches is made to raise, one after the other; so is, after a first
failure, every function that tells of it.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from toy import Toy, loss_of, toy

from moe_lab.health import Watch
from moe_lab.health.during import bank
from moe_lab.health.during.forward import ForwardProbe
from moe_lab.health.during.state import State
from moe_lab.health.torch_private import is_nested_step
from moe_lab.optim import Muon

GUARDS = {"Hook.__call__", "Watch.stop", "Watch.fail"}  # what catches
# the model's own code is called there, and may not like it: no answer is an answer
ASKING_THE_MODEL = {"tensors_of", "ForwardProbe.repeat"}
OTHER_WAYS = {"Replays.add_samples"}  # whole tensors are tried then
OTHERS_CALLS = {"Watch.observe"}  # by the training itself

ERRORS = [KeyError("key"), torch.OutOfMemoryError("CUDA out of memory")]
ERRORS += [torch.AcceleratorError("CUDA error: an illegal memory access")] if hasattr(torch, "AcceleratorError") else []

# six updates reach what hundreds would
HURRY = {"state.READ_EVERY": 2, "state.WINDOW": 4, "watch.WINDOW": 4, "watch.CHECK_EVERY": 2, "watch.LISTENED": 6}
HURRY |= {"rules_signal.WAIT": 2, "rules_signal.WAIT_READINGS": 1, "rules_updates.LOST_UPDATES": 2}
HURRY |= {"rules_updates.UNREPLAYED": 3, "rules_updates.FROZEN_READINGS": 1, "rules_updates.BIAS_ELEMENTS": 1}
HURRY |= {"events.LOOKS": 2, "rules_loss.LR_STEADY": 2, "rules_loss.LR_ACTED": 2.0}
HURRY |= {"rules_schedule.LR_STEADY": 2, "rules_schedule.LR_ACTED": 2.0}


class Spare(Toy):
    """One tensor gets no gradient."""

    def __init__(self):
        super().__init__(width=8)
        self.spare = nn.Parameter(torch.ones(3))


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch) -> None:
    for name, limit in HURRY.items():
        monkeypatch.setattr(f"moe_lab.health.during.{name}", limit)
    trained.untouched = trained(watching=False)[0]


def trained(watching: bool = True, during: Callable[[], object] = lambda: None, log=None) -> tuple[list, Watch | None]:
    """The weights after six updates in bfloat16, and the watch. `during` is called once the watch is attached."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Spare().bfloat16()
        matrices = [model.up.weight, model.down.weight]
        rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
        optimizers = [Muon(matrices, lr=1e-4), AdamW(rest, lr=1e-4)]
        watch = Watch(model, optimizers, budget=100, log=log) if watching else None
        stop = during()
        for step in range(6):
            loss = loss_of(model, step)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if watch:
                watch.observe(loss=loss.detach())
        if stop:
            stop()
    return [p.detach().clone() for p in model.parameters()], watch


def functions_of_health() -> dict[types.CodeType, types.FunctionType]:
    """Every function and method of the package's loaded modules, by its code."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("moe_lab.health"):
            classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == name]
            for member in (m for space in (module, *classes) for m in vars(space).values()):
                member = member.fget if isinstance(member, property) else getattr(member, "when", member)
                function = inspect.unwrap(member) if callable(member) else member
                if isinstance(function, types.FunctionType) and "moe_lab/health" in function.__code__.co_filename:
                    found[function.__code__] = function
    return found


def reached(run: Callable) -> list[types.FunctionType]:
    """The package's functions that a training calls once the watch is attached, in the order of their first call."""
    known, seen = functions_of_health(), {}

    def note(frame, event, argument) -> None:
        if event == "call" and frame.f_code in known:
            seen[known[frame.f_code]] = None

    def begin() -> Callable:
        sys.setprofile(note)
        return lambda: sys.setprofile(None)

    try:
        run(during=begin)
    finally:
        sys.setprofile(None)
    return [f for f in seen if f.__qualname__ not in GUARDS | ASKING_THE_MODEL | OTHERS_CALLS]


def raiser(*args, **kwargs):
    import sys

    sys.faults_raised += 1
    raise sys.fault


@contextmanager
def broken(function: types.FunctionType, error: Exception) -> Iterator[None]:
    """The function, wherever it is known, raises."""
    kept, sys.fault, sys.faults_raised = function.__code__, error, 0
    if function.__code__.co_freevars:  # a closure's code cannot be exchanged; these few are decorated by torch
        pytest.fail(f"{function.__qualname__} is a closure")
    function.__code__ = raiser.__code__
    try:
        yield
    finally:
        function.__code__ = kept


def goes_on(functions: Sequence[types.FunctionType], error: Exception, log=None) -> None:
    """The training reaches the same weights while these raise, and there is a finding."""
    name = functions[-1].__qualname__
    stack = ExitStack()

    def begin() -> Callable:
        for function in functions:
            stack.enter_context(broken(function, error))
        return stack.close

    try:
        weights, watch = trained(during=begin, log=log)
    except Exception as raised:
        pytest.fail(f"{name} ended the training: {type(raised).__name__}: {raised}")
    finally:
        stack.close()
    assert sys.faults_raised, f"{name} was not called"
    assert all(torch.equal(a, b) for a, b in zip(weights, trained.untouched, strict=True)), name
    told = [f for f in watch.findings if f.rule == "not_measured"]
    assert told or name in OTHER_WAYS, name
    assert len(told) <= 20, f"{name}: {len(told)} findings"  # one of each rule that needs the function


def test_no_function_that_a_hook_reaches_can_end_the_training() -> None:
    functions = reached(trained)
    names = {f.__qualname__ for f in functions}
    assert {"is_nested_step", "Bank.sums", "ulp", "elements", "no_gradient", "State.follow", "share_of"} <= names
    assert {"ForwardProbe.keep_variance", "ForwardProbe.keep_ids", "Replays.add", "Published.add"} <= names
    assert len(functions) > 60
    for n, function in enumerate(functions):
        goes_on([function], ERRORS[n % len(ERRORS)])


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("function", [is_nested_step, ForwardProbe.keep_variance], ids=lambda f: f.__name__)
def test_no_class_of_error_gets_past_a_hook(function, error) -> None:
    goes_on([function], error)


def test_nor_can_a_function_that_tells_of_a_failure(tmp_path) -> None:
    log = tmp_path / "log.jsonl"

    def failing(during) -> None:
        with broken(bank.Bank.sums, KeyError("first")):
            trained(during=during, log=log)

    functions = reached(failing)
    assert {"Published.add_failure", "Watch.close", "Listener.close", "Published.note"} <= {
        f.__qualname__ for f in functions
    }
    for function in functions:
        goes_on([bank.Bank.sums, function] if function is not bank.Bank.sums else [function], KeyError("second"), log)


def test_the_training_may_have_errors_of_its_own() -> None:
    """Only what the watch itself raises is caught; a stop from the keyboard is not the watch's either."""
    model = toy()
    optimizer = AdamW(model.parameters())
    watch = Watch(model, optimizer)
    with broken(State.follow, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        for step in range(2):
            loss_of(model, step).backward()
            optimizer.step()
    watch.close()
