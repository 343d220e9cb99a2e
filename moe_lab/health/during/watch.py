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

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import Finding
from ..measures import Reading
from ..torch_private import is_nested_step
from .bank import Bank, Tracked, banks_of
from .forward import ForwardProbe, Hook
from .gradients import Gradients
from .intended import N_MATRICES, Replays
from .published import LAST_WORDS, Published
from .report import table
from .rules import ALL
from .state import HISTORY, GroupState, State, fetch
from .steps import Steps
from .tracking import innermost, named_groups, refusals, track

READ_EVERY = 5  # updates between looks at the gradients
CHECK_EVERY = 10  # updates between checks of the rules: the only transfers from the device
WINDOW = 200  # updates over which intended and realised displacement are compared, at most
LISTENED = 20  # updates during which forward passes are listened to


class Watch:
    """Watches `model` while `optimizer` (one, or a list) trains it.

    `budget`: optimizer updates planned, for statements about reach; `expect_frozen`: names or name prefixes of tensors that
    are frozen on purpose; `log`: a file to which each finding is appended as a line of JSON. `observe(loss=…)` once a step
    lets it judge the loss. `n_matrices`: 16-bit matrices under Muon whose steps are replayed; each costs about what the real
    step costs. `findings` grows as rules speak; of each tensor, group or loss a rule says a thing once. Parameters that are
    unfrozen or given to an optimizer later are taken in at the next check. Where `step` is given a closure, the gradients are
    looked at afterwards and the step is not replayed: lost updates are then seen only where nothing moves at all.

    A resumed run's watch is given `start_step`, the updates that the checkpoint holds: it counts on from there, reads and checks
    at the same steps as an uninterrupted one, takes what stands in `log` up to there as its own findings, and out of the file
    what stands beyond. What it has to see anew are start values, gradients and losses: rules that wait, wait again (20 updates
    for lost ones), and what they named before is not named again.
    Raises ValueError, one line, for an optimizer without parameters, a model on the meta device, names in `expect_frozen`
    that no tensor has, or a log that cannot be written or holds something else.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        budget: int | None = None,
        expect_frozen: Sequence[str] = (),
        start_step: int = 0,
        *,
        log: str | Path | None = None,
        n_matrices: int = N_MATRICES,
    ):
        self.model, self.budget, self.start_step = model, budget, start_step
        given = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
        self.optimizers = [innermost(o) for o in given]
        for refusal in refusals(model, self.optimizers, expect_frozen):
            raise ValueError(refusal)
        self.published = Published(log, start_step)
        names = [name for name, _ in model.named_parameters()]
        self.frozen_on_purpose = {name for name in names if name.startswith(tuple(expect_frozen))}
        self.findings: list[Finding] = self.published.findings
        self.rules = list(ALL)
        self.losses: list[Tensor | float] = []
        self.fetched_losses: list[float] = []
        self.readings: list[Reading] = []
        self.counts = Counter({id(o): start_step for o in self.optimizers})  # of the run's updates
        self.next_check = (start_step // CHECK_EVERY + 1) * CHECK_EVERY
        self.window_start = self.last_read = start_step
        self.gradients, self.replays, self.steps = Gradients(), Replays(n_matrices), Steps()
        self.tracked: list[Tracked] = []
        self.banks: list[Bank] = []
        self.groups: list[GroupState] = []
        self.signature: tuple = ()
        self.follow()
        self.forward = ForwardProbe(model, self.forward_failed, is_new=not start_step)
        self.handles: list = []
        self.attach()
        self.apply(self.state(), at_start=True)

    # ---- what a caller uses ------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float) -> None:
        """The loss of a step, as it is reported (nats per token for a language model). Fetched only when rules are checked."""
        try:
            self.losses.append(loss.detach().clone() if isinstance(loss, Tensor) else float(loss))
        except Exception as error:
            self.publish_failure("warning", "loss", "a loss that was observed cannot be read", error)

    def check(self) -> list[Finding]:
        """Read everything now, apply the rules, and return what is new. Done by itself every few updates."""
        n = len(self.findings)
        try:
            with torch.no_grad():
                self.read()
                self.apply(self.state())
                if self.step // WINDOW > self.window_start // WINDOW:
                    self.restart_window()
        except Exception as error:
            self.failed(error)
        return self.findings[n:]

    def report(self) -> None:
        """Print a table, a line a kind of tensor, and the findings so far; while attached, of a reading made now."""
        if self.handles:
            self.check()
        print(table(self.readings, self.last_read))
        for finding in self.findings:
            print(finding)
        if not self.findings:
            print("no findings")

    def attach(self) -> None:
        """Put the hooks on the optimizers, as the constructor does; again, after `close`."""
        if self.handles:
            return
        if self.n_seen:
            self.restart_window()  # what happened meanwhile was not seen
        before, after = Hook(self.before_step, self.failed), Hook(self.after_step, self.failed)
        self.handles = [o.register_step_pre_hook(before) for o in self.optimizers]
        self.handles += [o.register_step_post_hook(after) for o in self.optimizers]

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
            self.check()
        self.close()

    @property
    def step(self) -> int:
        """Optimizer updates of the run so far: `start_step`, and those seen."""
        return max(self.counts.values())

    @property
    def n_seen(self) -> int:
        """Optimizer updates under this watch."""
        return self.step - self.start_step

    def n_bytes(self) -> int:
        """Memory that the samples take, on their devices."""
        return sum(bank.n_bytes() for bank in self.banks)

    # ---- hooks: each is called by a Hook, which lets no error through ------------------------------------------------

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if is_nested_step(optimizer):
            return
        if not self.n_seen:  # weights may have been loaded since the watch was made: what moves counts from here
            self.banks = banks_of(self.tracked)
        self.counts[id(optimizer)] += 1
        for group in self.groups:
            if group.optimizer is optimizer:
                group.note_lr()
        if not has_closure(args, kwargs):
            self.read_gradients(optimizer)
            name, error = type(optimizer).__name__, self.replays.add(optimizer)
            if error is not None:
                what = f"{name}'s steps cannot be replayed: what rounding loses is not measured"
                self.publish_failure("info", name, what, error)
            self.steps.begin(optimizer, self.counts[id(optimizer)], self.replays.last)

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if is_nested_step(optimizer):
            return
        self.steps.end(optimizer, self.counts[id(optimizer)])
        if has_closure(args, kwargs):  # the gradients were made inside the step
            self.read_gradients(optimizer)
        slowest = min(count for count in self.counts.values() if count > self.start_step)
        # once all that step together have done so; one that has stopped stepping is not waited for
        if self.step > self.next_check or slowest >= self.next_check:
            self.next_check = (self.step // CHECK_EVERY + 1) * CHECK_EVERY
            self.check()
            if self.n_seen >= LISTENED:
                self.forward.forget()

    def read_gradients(self, optimizer: Optimizer) -> None:
        if self.counts[id(optimizer)] % READ_EVERY == 1:
            owners = (optimizer, None) if optimizer is self.optimizers[0] else (optimizer,)
            self.gradients.read([t for t in self.tracked if t.optimizer in owners], optimizer)

    def failed(self, error: Exception) -> None:
        """Stop and say so; the training goes on."""
        self.give_up("the watch", "the watch stopped", error, self.close)

    def forward_failed(self, error: Exception) -> None:
        """Go on without listening to forward passes."""
        what = "forward passes are no longer listened to: the first loss and missing gradients are judged by less"
        self.give_up("the forward pass", what, error, self.forward.close)

    def give_up(self, where: str, what: str, error: Exception, stop: Callable[[], None]) -> None:
        """Say so and stop, whatever else is broken by now."""
        try:
            self.publish_failure("warning", where, what, error)
            stop()
        except Exception:
            self.findings.append(LAST_WORDS)

    # ---- readings ----------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Fetch what waits on the devices, and read all samples if a step was taken since, else those of new tensors."""
        new = self.follow()
        for group in self.groups:
            group.fetch()
        self.gradients.fetch()
        self.steps.fetch()
        if self.replays.fetch():
            self.restart_window()
        if self.step > self.last_read or not self.readings:
            self.last_read = self.step
            self.readings = [reading for bank in self.banks for reading in bank.read()]
        else:
            self.readings += [reading for bank in new for reading in bank.read()]
        self.fetched_losses += fetch(self.losses)
        self.losses = []
        if len(self.fetched_losses) > 3 * HISTORY:
            del self.fetched_losses[HISTORY:-HISTORY]

    def follow(self) -> list[Bank]:
        """Take in what is new: parameters that were unfrozen or given to an optimizer, and their groups. Returns their banks."""
        updated = [id(p) for o in self.optimizers for group in o.param_groups for p in group["params"]]
        signature = (*updated, *((id(p), p.requires_grad) for p in self.model.parameters()))
        if signature == self.signature:
            return []
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
        banks = banks_of(new)
        self.banks += banks
        groups = {(id(g.optimizer), g.number): g for g in self.groups}
        self.groups = [groups.get((id(o), n)) or GroupState(o, n, name) for o, n, name in named_groups(self.optimizers)]
        self.replays.choose(self.tracked)
        self.steps.choose(self.tracked)
        self.restart_window()
        return banks

    def restart_window(self) -> None:
        self.window_start = self.step
        for bank in self.banks:
            bank.restart_window()

    # ---- rules -------------------------------------------------------------------------------------------------------

    def state(self) -> State:
        return State(
            step=self.step,
            n_seen=self.n_seen,
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
            findings=self.findings,
        )

    def apply(self, state: State, at_start: bool = False) -> None:
        """Ask each rule, and publish what it has to say of what it did not name before."""
        for rule in self.rules:
            if at_start and not rule.static:
                continue
            try:
                ill = rule.when(state)
                ill = {name: ill[name] for name in ill if self.published.is_news(rule.id, rule.severity, name)}
                if ill:
                    self.published.add(rule.finding(state, ill), *ill)
            except Exception as error:  # it is asked again at the next check
                self.publish_failure("warning", f"rule {rule.id}", f"the rule {rule.id} failed", error)

    def publish_failure(self, severity: str, where: str, what: str, error: Exception) -> None:
        self.published.add_failure(severity, where, self.step, what, error)


def has_closure(args: tuple, kwargs: dict) -> bool:
    """Whether `step` was given a function that makes the gradients; the first of `args` is the optimizer."""
    return any(callable(a) for a in (*args[1:], *kwargs.values()))
