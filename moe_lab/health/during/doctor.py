"""Watches a training script that knows nothing of it: `doctor train.py [args]`, `doctor -m module [args]`.

At an optimizer's first step, which torch tells everybody, the modules are looked up that hold its parameters, and a Watch is
attached. Its losses are the roots of the backward passes.
"""

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from importlib.util import find_spec

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..torch_private import backward_heard, has_step_hooks
from .listener import Hook
from .reached import alive
from .tracking import held_by
from .watch import Watch, has_closure

MOST_ACCUMULATED = 500  # losses without an update after which it is said that there is none
USAGE = "doctor takes a script and its arguments: doctor train.py [args], or doctor -m module [args]"


class Doctor:
    """Finds what trains, and keeps a Watch on each model with its optimizers."""

    def __init__(self) -> None:
        self.watches: dict[tuple, Watch] = {}  # by the ids of the modules
        self.known: set[int] = set()  # ids of optimizers that were looked at
        self.left: set[int] = set()  # of those whose watch was ended, because another training had begun
        self.loss: Tensor | None = None  # the sum of the roots since the last update: what the update is about
        self.n_losses, self.in_closure = 0, False

    def say(self, line: str) -> None:
        print(f"doctor: {line}", file=sys.stderr, flush=True)

    def hear(self, root: Tensor) -> None:
        """A loss: micro-batches add up, as their gradients do; of a closure's evaluations the last one counts."""
        first = self.loss is None or self.in_closure
        self.loss = root.float().clone() if first else self.loss + root.float()
        self.n_losses += 1
        for watch in self.only_watch():
            watch.state.outside.reached.observe(root)
        if self.n_losses == MOST_ACCUMULATED:
            for optimizer in [] if self.watches else alive(Optimizer):
                self.begin(optimizer)
            self.observe(self.n_losses)

    def only_watch(self) -> list[Watch]:
        """Of several models it cannot be told whose loss it is."""
        return list(self.watches.values()) if len(self.watches) == 1 else []

    def observe(self, times: int = 1) -> None:
        for watch in self.only_watch() if self.loss is not None else ():
            for _ in range(times):
                watch.observe(loss=self.loss / times)
        self.loss = None

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.in_closure = has_closure(args, kwargs)
        if id(optimizer) not in self.known:
            self.begin(optimizer)
        self.observe()
        self.n_losses = 0

    def after_step(self, *_: object) -> None:
        self.in_closure = False

    def begin(self, optimizer: Optimizer) -> None:
        """A watch on what this optimizer trains, and on what else trains it. Earlier trainings are over then, and their models
        may go, unless one of them goes on: then both are watched."""
        modules = alive(nn.Module)
        trained = trained_by(optimizer, modules)
        key = tuple(map(id, trained))
        for old in [old for old in self.watches if id(optimizer) not in self.left or old == key]:
            watch = self.watches.pop(old)
            watch.close()
            self.left |= set(map(id, watch.state.optimizers))
            self.known -= self.left
        mine, together = set(map(id, held_by([optimizer]))), [optimizer]
        for other in alive(Optimizer):
            if has_step_hooks(other) and trained and mine.isdisjoint(map(id, held_by([other]))):
                together += [other] if trained_by(other, modules) == trained else []
        self.known |= set(map(id, together))
        names = " under ".join(", ".join(type(thing).__name__ for thing in things) for things in (trained, together))
        try:
            model = trained[0] if len(trained) == 1 else nn.ModuleList(trained)
            self.watches[key] = Watch(model, together)
            self.say(f"watching {names}")
        except ValueError as error:
            self.say(f"not watched: {names}: {error}")

    def close(self) -> None:
        for watch in self.watches.values():
            watch.check()
            watch.close()
        if not self.known:
            self.say("no optimizer of torch made a step: nothing was watched")
        elif len(self.watches) > 1:
            self.say("not checked: the losses: of several models it cannot be told whose they are")


def trained_by(optimizer: Optimizer, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The outermost module with the most of the parameters, and the fewest others; where each has some, as many as it takes."""
    inner = {id(child) for module in modules for child in module._modules.values()}
    outermost = [(m, {id(p) for p in m.parameters()}) for m in modules if id(m) not in inner]
    chosen, missing = [], set(map(id, held_by([optimizer])))
    while any(held & missing for _, held in outermost):
        best, held = max(outermost, key=lambda pair: (len(pair[1] & missing), -len(pair[1])))
        chosen.append(best)
        missing -= held
    # of copies in float32 the watch finds out whose they are
    return chosen or [m for m, held in sorted(outermost, key=lambda pair: len(pair[1]))[-1:] if held]


def target(argv: Sequence[str]) -> tuple[Callable[[], object], list[str]]:
    """What to run, and its arguments, its own name first. Raises ValueError, in one line."""
    if argv[:1] == ["-m"] and len(argv) > 1:
        sys.path.insert(0, os.getcwd())
        found = None
        with suppress(ImportError):
            found = find_spec(argv[1])
        if found is None:
            raise ValueError(f"{argv[1]}: no such module; give the name that python -m takes")
        return partial(runpy.run_module, argv[1], run_name="__main__", alter_sys=True), list(argv[1:])
    if not argv or argv[0].startswith("-"):
        raise ValueError(USAGE)
    if not os.path.isfile(argv[0]):
        raise ValueError(f"{argv[0]}: {'is a folder' if os.path.isdir(argv[0]) else 'no such file'}; {USAGE}")
    sys.path.insert(0, os.path.dirname(os.path.abspath(argv[0])))
    return partial(runpy.run_path, argv[0], run_name="__main__"), list(argv)


def command(argv: Sequence[str]) -> int:
    """Run a script as `__main__` and watch its training; findings go to stderr. What it raises, exit codes and Ctrl-C, passes."""
    try:
        if argv[:1] != ["doctor"]:
            raise ValueError(USAGE)
        run, arguments = target(argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    doctor, sys.argv = Doctor(), arguments
    hook = partial(Hook, failed=lambda error: doctor.say(f"not watched: {type(error).__name__}: {error}"))
    with ExitStack() as stack:
        stack.callback(doctor.close)
        stack.callback(register_optimizer_step_pre_hook(hook(doctor.before_step)).remove)
        stack.callback(register_optimizer_step_post_hook(hook(doctor.after_step)).remove)
        stack.enter_context(backward_heard(hook(doctor.hear)))
        run()
    return 0
