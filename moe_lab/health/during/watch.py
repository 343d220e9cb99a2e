"""A watch over a training: attached to the optimizers' own step hooks, it says by step 100 what is wrong.

Between checks no value is fetched from the device, and only gradients of every fifth update are looked at. Where weights
are kept in 16 bits the optimizer's step is replayed on sampled elements, every update. No number of the training changes,
and an error of the watch ends the watch, with a finding, and not the training.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..findings import Finding
from ..sampling import EARLY
from ..torch_private import is_nested_step
from .events import ignore
from .intended import N_MATRICES
from .listener import Hook
from .report import LAST_WORDS, STANDS, Published, closing, table, unchecked
from .rule import Rule
from .rules import ALL, AT_START
from .rules_ranks import seen_here
from .rules_updates import N_LOSSES
from .state import WINDOW, State
from .tracking import Tracked, all_innermost, module_of, refuse_bad_input

CHECK_EVERY, LATER = 10, 20  # updates between checks of the rules, the only transfers from the device: early, and later
LISTENED = 20  # updates during which all of a forward pass is listened to


class Watch:
    """Watches `model` while `optimizer` (one, or a list) trains it.

    `budget`: optimizer updates planned, for statements about reach; `expect_frozen`: names or name prefixes of tensors that
    are frozen on purpose; `log`: a file to which each finding is appended as a line of JSON. `observe(loss=…)` once a step
    lets it judge the loss. `n_matrices`: 16-bit matrices under Muon whose steps are replayed; each costs about what the real
    step costs. `findings` grows as rules speak, and each is printed to stderr when it is made, as is at the end what was not
    checked, and why (`quiet=True`: neither); of each tensor, group or loss a rule says a thing once. Parameters that are
    unfrozen or given to an optimizer later are taken in at the next check. Where `step` is given a closure, the gradients are
    looked at afterwards and the step is not replayed: lost updates are then seen only where nothing moves at all.

    A resumed run's watch is given `start_step`, the updates that the checkpoint holds: it counts on from there, reads and checks
    at the same steps as an uninterrupted one, takes what stands in `log` up to there as its own findings, and out of the file
    what stands beyond. What it has to see anew are start values, gradients and losses: rules that wait, wait again (20 updates
    for lost ones), and what they named before is not named again.
    Raises ValueError, one line, for optimizers without a parameter of the model, a model on the meta device, names in
    `expect_frozen` that no tensor has, or a log that cannot be written or holds something else.
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
        quiet: bool = False,
    ):
        given = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
        optimizers = all_innermost(given)
        wrappers = [thing for thing in (*given, model) if not isinstance(thing, Optimizer | nn.Module)]
        model = module_of(model)
        refuse_bad_input(model, optimizers, expect_frozen)
        self.published = Published(log, start_step, quiet)
        self.findings: list[Finding] = self.published.findings
        self.handles: list = []
        frozen = {name for name, _ in model.named_parameters() if name.startswith(tuple(expect_frozen))}
        self.state = State(model, optimizers, budget, frozen, start_step, n_matrices, self.findings)
        self.rules: Sequence[Rule] = ALL
        self.next_check = check_after(start_step)
        self.attach()
        self.hear_ranks()
        for kind in {type(wrapper).__name__: None for wrapper in wrappers}:
            message = f"{kind} is unknown here: what it holds is watched, and not what it does itself"
            self.published.add(Finding("not_measured", "info", kind, message, STANDS, step=self.step), [kind])
        self.apply(AT_START)

    # ---- what a caller uses ------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float) -> None:
        """The loss of a step, as it is reported (nats per token for a language model). Fetched only when rules are checked."""
        try:
            self.state.observe(loss)
            if self.state.events.n_losses % N_LOSSES == 0:  # no step, no check
                self.check()
        except Exception as error:
            self.fail(error, "loss", "a loss that was observed cannot be read")

    def check(self) -> list[Finding]:
        """Read everything now, apply the rules, and return what is new. Done by itself every few updates."""
        n = len(self.findings)
        try:
            with torch.no_grad():
                self.state.read()
                self.hear_ranks()
                self.apply(self.rules)
                if self.step // WINDOW > self.state.window_start // WINDOW:
                    self.state.restart_window()
        except Exception as error:
            self.stop(error)
        return self.findings[n:]

    def hear_ranks(self) -> None:
        failed = partial(self.fail, where="the ranks", what="what other ranks see is not compared")
        Hook(self.state.ranks.exchange, failed)(self.step, partial(seen_here, self.state))

    def report(self) -> None:
        """Print a table, a line a kind of tensor, and the findings so far; while attached, of a reading made now."""
        if self.handles:
            self.check()
        print(table(self.readings, self.state.last_read))
        for finding in self.findings:
            print(finding)
        if not self.findings:
            print("no findings" if self.state.n_seen else "no update was seen: nothing was judged")
        print(*(f"not checked: {what}: {why}" for what, why in unchecked(self.state).items()), sep="\n")

    def attach(self) -> None:
        """Hang all hooks up, again after `close`; on a watch that is attached nothing."""
        if self.handles:
            return
        before, after = Hook(self.before_step, self.stop), Hook(self.after_step, self.stop)
        self.handles = [o.register_step_pre_hook(before) for o in self.state.optimizers]
        self.handles += [o.register_step_post_hook(after) for o in self.state.optimizers]
        loaded = Hook(self.state.note_loaded, self.stop)
        self.handles += [o.register_load_state_dict_post_hook(loaded) for o in self.state.optimizers]
        is_early = self.state.n_seen < LISTENED
        for part in (self.state.outside, self.state.events, *([self.state.forward] if is_early else [])):
            part.listen(self.fail)

    def close(self) -> None:
        """Detach from model and optimizers. Findings stay."""
        try:
            self.published.say(closing(self.state) if self.handles else "")
        except Exception as error:
            self.fail(error, "what was not checked", "it cannot be said")
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for part in (self.state.forward, self.state.events, self.state.outside):
            part.close()
        self.state.waiting.pairs.clear()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None and self.handles:
            self.check()
        self.close()

    @property
    def step(self) -> int:
        """Optimizer updates of the run so far: `start_step`, and those seen."""
        return self.state.step

    @property
    def readings(self) -> list[Tracked]:
        """What is known of each tensor, as of the last check."""
        return self.state.readings

    # ---- hooks: each is called by a Hook, which lets no error through ------------------------------------------------

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if is_nested_step(optimizer):
            return
        error = self.state.before_update(optimizer, not has_closure(args, kwargs))
        if error is not None:
            name = type(optimizer).__name__
            self.fail(error, name, f"{name}'s steps cannot be replayed: what rounding loses is not measured", "info")

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if is_nested_step(optimizer):
            return
        self.state.after_update(optimizer, has_closure(args, kwargs))
        # once all that step together have done so; one that has stopped stepping is not waited for
        if self.step > self.next_check or self.state.slowest >= self.next_check:
            self.next_check = check_after(self.step)
            self.check()
            if self.state.n_seen >= LISTENED:
                self.state.forward.close()

    # ---- rules, and what fails ---------------------------------------------------------------------------------------

    def apply(self, rules: Sequence[Rule]) -> None:
        """Ask each rule, and publish what it has to say of what it did not name before."""
        for rule in rules:
            try:
                ill = rule.when(self.state).items()
                news = {k: facts for k, facts in ill if self.published.is_news(rule.id, rule.severity_of(facts), k)}
                if news:
                    self.published.add(rule.finding(self.state, news), list(news))
            except Exception as error:  # it is asked again at the next check
                self.fail(error, f"rule {rule.id}", f"the rule {rule.id} failed")

    def fail(self, error: Exception, where: str, what: str, severity: str = "warning", stop: Callable = ignore) -> None:
        """Say once for each `where` what is not measured, and stop it, whatever else is broken by now. The training goes on."""
        try:
            self.published.add_failure(error, where, what, self.step, severity)
            stop()
        except Exception:
            if LAST_WORDS not in self.findings:
                self.findings.append(LAST_WORDS)

    def stop(self, error: Exception) -> None:
        self.fail(error, "the watch", "the watch stopped", stop=self.close)


def check_after(step: int) -> int:
    every = CHECK_EVERY if step < EARLY else LATER
    return (step // every + 1) * every


def has_closure(args: tuple, kwargs: dict) -> bool:
    """Whether `step` was given a function that makes the gradients; the first of `args` is the optimizer."""
    return any(callable(a) for a in (*args[1:], *kwargs.values()))
