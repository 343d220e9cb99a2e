"""A watch over a training: attached to the optimizers' own step hooks, it says by step 100 what is wrong.

    with health.Watch(model, optimizer, log="findings.jsonl") as watch:
        for batch in batches:
            ...
            optimizer.step()
            watch.observe(loss=loss)      # optional
    watch.report()

Between checks it leaves the step alone: no value is fetched from the device, and only gradients of every fifth update are
looked at. Where weights are kept in 16 bits it also replays the optimizer's step on sampled elements, every update. It
changes no number of the training, and an error of its own ends the watch, with a finding, and not the training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import Finding
from ..measures import Reading
from ..torch_private import is_nested_step
from .bank import Bank, Tracked, banks_of
from .forward import ForwardProbe
from .gradients import Gradients
from .intended import Replays
from .report import table
from .rules import CHECKS
from .state import HISTORY, GroupState, State, fetch
from .tracking import N_MATRICES, check_input, named_groups, open_log, track

READ_EVERY = 5  # updates between looks at the gradients
CHECK_EVERY = 10  # updates between checks of the rules: the only transfers from the device
WINDOW = 200  # updates over which intended and realised displacement are compared, at most


class Watch:
    """Watches `model` while `optimizer` (one, or a list) trains it.

    `budget`: optimizer updates planned, for statements about reach; `expect_frozen`: names or name prefixes of tensors that
    are frozen on purpose; `log`: a file to which each finding is appended as a line of JSON. `observe(loss=…)` once a step
    lets it judge the loss. `n_matrices`: 16-bit matrices under Muon whose steps are replayed; each costs about what the real
    step costs. `findings` grows as rules speak; each says a thing once. Parameters that are unfrozen or given to
    an optimizer later are taken in at the next check. Where `step` is given a closure, the gradients are looked at
    afterwards and the step is not replayed: lost updates are then seen only where nothing moves at all.
    Raises ValueError, one line, for an optimizer without parameters, a model on the meta device, names in `expect_frozen`
    that no tensor has, or a log that cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        budget: int | None = None,
        expect_frozen: Sequence[str] = (),
        *,
        log: str | Path | None = None,
        n_matrices: int = N_MATRICES,
    ):
        self.model, self.budget = model, budget
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        names = check_input(model, self.optimizers, expect_frozen)
        self.log = None if log is None else open_log(log)
        self.frozen_on_purpose = {name for name in names if name.startswith(tuple(expect_frozen))}
        self.findings: list[Finding] = []
        self.said: set[tuple] = set()
        self.checks = list(CHECKS)
        self.losses: list[Tensor | float] = []
        self.fetched_losses: list[float] = []
        self.readings: list[Reading] = []
        self.counts = Counter({id(o): 0 for o in self.optimizers})
        self.next_check, self.window_start, self.read_at = CHECK_EVERY, 0, 0
        self.gradients, self.replays = Gradients(), Replays(n_matrices)
        self.tracked: list[Tracked] = []
        self.banks: list[Bank] = []
        self.groups: list[GroupState] = []
        self.signature: tuple = ()
        self.follow()
        self.forward = ForwardProbe(model)
        self.handles: list = []
        self.attach()
        self.apply(self.state(), at_start=True)

    # ---- what a caller uses ------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float) -> None:
        """The loss of a step, as it is reported (nats per token for a language model). Fetched only when rules are checked."""
        self.losses.append(loss.detach().clone() if isinstance(loss, Tensor) else float(loss))

    @torch.no_grad()
    def check(self) -> list[Finding]:
        """Read everything now, apply the rules, and return what is new. Done by itself every few updates."""
        self.follow()
        for group in self.groups:
            group.fetch()
        self.gradients.fetch()
        if self.step > self.read_at or not self.readings:
            self.read_at = self.step
            self.readings = [r for bank in self.banks for r in bank.read()]
        self.fetched_losses += fetch(self.losses)
        self.losses = []
        if len(self.fetched_losses) > 3 * HISTORY:
            del self.fetched_losses[HISTORY:-HISTORY]
        new = self.apply(self.state())
        if self.step - self.window_start >= WINDOW:
            self.restart_window()
        return new

    def report(self) -> None:
        """Print a table, a line a kind of tensor, and the findings so far; while attached, of a reading made now."""
        if self.handles:
            self.check()
        print(table(self.readings, self.read_at))
        for finding in self.findings:
            print(finding)
        if not self.findings:
            print("no findings")

    def attach(self) -> None:
        """Put the hooks on the optimizers, as the constructor does; again, after `close`."""
        if self.handles:
            return
        if self.step:
            self.restart_window()  # what happened meanwhile was not seen
        self.handles = [o.register_step_pre_hook(self.before_step) for o in self.optimizers]
        self.handles += [o.register_step_post_hook(self.after_step) for o in self.optimizers]

    def close(self) -> None:
        """Detach from model and optimizers. Findings stay."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.forward.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None and self.handles:
            with self.safely():
                self.check()
        self.close()

    @property
    def step(self) -> int:
        """Optimizer updates seen."""
        return max(self.counts.values())

    def n_bytes(self) -> int:
        """Memory that the samples take, on their devices."""
        return sum(bank.n_bytes() for bank in self.banks)

    # ---- hooks -------------------------------------------------------------------------------------------------------

    @contextmanager
    def safely(self) -> Iterator[None]:
        """What the watch does within a training: if it fails, it stops and says so, and the training goes on."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:
            self.close()
            self.cannot("warning", "the watch", f"the watch stopped at update {self.step}", error)

    def cannot(self, severity: str, where: str, what: str, error: Exception) -> list[Finding]:
        told = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = "what was found before stands; the training itself is not affected"
        return self.say([self.state().finding("not_measured", severity, where, told, advice)])

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if is_nested_step(optimizer):
            return
        key = id(optimizer)
        with self.safely():
            if not self.step:  # weights may have been loaded since the watch was made: what moves counts from here
                self.banks = banks_of(self.tracked)
                self.replays.choose(self.tracked, self.banks)
            self.counts[key] += 1
            for group in self.groups:
                if group.optimizer is optimizer:
                    group.saw()
            if not has_closure(args, kwargs):
                self.read_gradients(optimizer)
                self.replays.add(optimizer, lambda error: self.cannot_replay(optimizer, error))

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if is_nested_step(optimizer):
            return
        with self.safely():
            if has_closure(args, kwargs):  # the gradients were made inside the step
                self.read_gradients(optimizer)
            slowest = min(count for count in self.counts.values() if count)
            # once all that step together have done so; one that has stopped stepping is not waited for
            if self.step > self.next_check or slowest >= self.next_check:
                self.next_check = self.step + CHECK_EVERY
                self.check()
                if self.step >= 2 * CHECK_EVERY:
                    self.forward.forget()

    def read_gradients(self, optimizer: Optimizer) -> None:
        if self.counts[id(optimizer)] % READ_EVERY == 1:
            owners = (optimizer, None) if optimizer is self.optimizers[0] else (optimizer,)
            self.gradients.read([t for t in self.tracked if t.optimizer in owners], self.banks, optimizer)

    def cannot_replay(self, optimizer: Optimizer, error: Exception) -> None:
        name = type(optimizer).__name__
        self.cannot("info", name, f"{name}'s steps cannot be replayed: what rounding loses is not measured", error)

    def follow(self) -> None:
        """Take in what is new: parameters that were unfrozen or given to an optimizer, and their groups."""
        updated = [id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]]
        signature = (*updated, *((id(p), p.requires_grad) for p in self.model.parameters()))
        if signature == self.signature:
            return
        self.signature = signature
        found, self.outside = track(self.model, self.optimizers)
        known = {id(t.param): t for t in self.tracked}
        now = {id(t.param): t for t in found}
        for key, old in known.items():  # who owns it may have changed
            t = now.get(key)
            old.optimizer = t and t.optimizer
            if t is not None:
                old.group_number, old.group_name = t.group_number, t.group_name
        new = [t for key, t in now.items() if key not in known]
        self.tracked += new
        self.banks += banks_of(new)
        groups = {(id(g.optimizer), g.number): g for g in self.groups}
        self.groups = [groups.get((id(o), n)) or GroupState(o, n, name) for o, n, name in named_groups(self.optimizers)]
        self.replays.choose(self.tracked, self.banks)
        self.restart_window()

    def restart_window(self) -> None:
        self.window_start = self.step
        for bank in self.banks:
            bank.restart_window()

    # ---- rules -------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        return State(
            step=self.step,
            window=self.step - self.window_start,
            model=self.model,
            readings=self.readings,
            tracked=self.tracked,
            groups=self.groups,
            outside=self.outside,
            frozen_on_purpose=self.frozen_on_purpose,
            losses=self.fetched_losses,
            forward=self.forward,
            budget=self.budget,
        )

    def apply(self, state: State, at_start: bool = False) -> list[Finding]:
        new = []
        for check in list(self.checks):
            if at_start and not getattr(check, "static", False):
                continue
            try:
                found = list(check(state))
                if found and getattr(check, "once", False):
                    self.checks.remove(check)
                new += self.say(found)
            except Exception as error:
                self.checks.remove(check)
                new += self.cannot("warning", check.__name__, f"the rule {check.__name__} failed and is off", error)
        return new

    def say(self, findings: Iterable[Finding]) -> list[Finding]:
        """Keep and log those that were not said before."""
        new = []
        for finding in findings:
            key = (finding.rule, finding.severity, finding.where if finding.rule == "not_measured" else None)
            if key not in self.said:
                self.said.add(key)
                new.append(finding)
        self.findings += new
        if self.log and new:
            lines = [json.dumps(f.to_dict(), ensure_ascii=False) + "\n" for f in new]
            try:
                with self.log.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as error:
                path, self.log = self.log, None
                new += self.cannot("warning", str(path), "findings are no longer written there", error)
        return new


def has_closure(args: tuple, kwargs: dict) -> bool:
    """Whether `step` was given a function that makes the gradients; the first of `args` is the optimizer."""
    return any(callable(a) for a in (*args[1:], *kwargs.values()))
