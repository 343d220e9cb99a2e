"""A watch over a training: attached to the optimizers' own step hooks, it says by step 100 what is wrong.

    with health.Watch(model, optimizer, log="findings.jsonl") as watch:
        for batch in batches:
            ...
            optimizer.step()
            watch.observe(loss=loss)      # optional
    watch.report()

Between readings it leaves the step alone: no value is fetched from the device, and only gradients of every fifth update are
looked at. Where weights are kept in 16 bits it also replays the optimizer's step on sampled elements, every update.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_lab.health import intended
from moe_lab.health.findings import Finding
from moe_lab.health.forward import ForwardProbe
from moe_lab.health.measures import Reading
from moe_lab.health.rules import CHECKS
from moe_lab.health.sampling import Bank, Tracked
from moe_lab.health.state import GroupState, State
from moe_lab.health.tracking import check_input, choose_replayed, named_groups, track

READ_EVERY = 5  # updates between looks at the gradients
CHECK_EVERY = 10  # updates between checks of the rules: one transfer from the device each
WINDOW = 200  # updates over which intended and realised displacement are compared, at most


class Watch:
    """Watches `model` while `optimizer` (one, or a list) trains it.

    `budget`: optimizer updates planned, for statements about reach; `expect_frozen`: names or name prefixes of tensors that
    are frozen on purpose; `log`: a file to which each finding is appended as a line of JSON. `observe(loss=…)` once a step
    lets it judge the loss. `findings` grows as rules speak; each says a thing once. Raises ValueError, one line, for an
    optimizer without parameters, a model on the meta device, or names in `expect_frozen` that no tensor has.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        budget: int | None = None,
        expect_frozen: Sequence[str] = (),
        *,
        log: str | Path | None = None,
    ):
        self.model, self.budget, self.log = model, budget, Path(log) if log else None
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.findings: list[Finding] = []
        self.said: set[tuple] = set()
        self.losses: list[Tensor | float] = []
        self.fetched_losses: list[float] = []
        self.readings: list[Reading] = []
        self.counts = Counter({id(o): 0 for o in self.optimizers})
        self.next_check, self.window_start = CHECK_EVERY, 0
        self.norms_waiting: list[tuple[list[Tracked], Tensor]] = []
        names = check_input(model, self.optimizers, expect_frozen)
        self.frozen_on_purpose = (
            {name for name in names if name.startswith(tuple(expect_frozen))} if expect_frozen else set()
        )
        self.tracked, self.outside = track(model, self.optimizers)
        devices = {t.param.device for t in self.tracked}
        self.banks = [Bank([t for t in self.tracked if t.param.device == device]) for device in devices]
        self.groups = [GroupState(o, group, name) for o, group, name in named_groups(self.optimizers)]
        self.replayed = choose_replayed(self.tracked)
        self.forward = ForwardProbe(model)
        self.handles = [o.register_step_pre_hook(self.before_step) for o in self.optimizers]
        self.handles += [o.register_step_post_hook(self.after_step) for o in self.optimizers]
        self.apply(self.state(), at_start=True)

    # ---- what a caller uses ------------------------------------------------------------------------------------------

    def observe(self, *, loss: Tensor | float) -> None:
        """The loss of a step, as it is reported (nats per token for a language model). Fetched only when rules are checked."""
        self.losses.append(loss.detach() if isinstance(loss, Tensor) else float(loss))

    def check(self) -> list[Finding]:
        """Read everything now, apply the rules, and return what is new. Done by itself every few updates."""
        for bank in self.banks:
            sums = bank.read().tolist()  # the transfer
            self.fetch_norms()
            readings = bank.readings(sums)
            self.readings = [r for r in self.readings if r.name not in {new.name for new in readings}] + readings
        self.fetched_losses += fetch(self.losses)
        self.losses = []
        new = self.apply(self.state())
        if self.step - self.window_start >= WINDOW:
            self.window_start = self.step
            for bank in self.banks:
                bank.restart_window()
        return new

    def report(self) -> None:
        """Print a table, a line a kind of tensor, and the findings so far."""
        from moe_lab.health.report import table

        print(table(self.readings, self.step))
        for finding in self.findings:
            print(finding)
        if not self.findings:
            print("no findings")

    def close(self) -> None:
        """Detach from model and optimizers. Findings stay."""
        for handle in self.handles:
            handle.remove()
        self.forward.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def step(self) -> int:
        """Optimizer updates seen."""
        return max(self.counts.values())

    def n_bytes(self) -> int:
        """Memory that the samples take, on their devices."""
        return sum(bank.n_bytes() for bank in self.banks)

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.counts[id(optimizer)] += 1
        if any(callable(a) for a in (*args, *kwargs.values())):
            return  # the gradients are made inside the step (a closure): there is nothing to look at yet
        count = self.counts[id(optimizer)]
        for group in self.groups:
            if group.optimizer is optimizer:
                group.saw(count)
        with torch.no_grad():
            if count % READ_EVERY == 1:
                self.read_gradients(
                    [
                        t
                        for t in self.tracked
                        if t.optimizer is optimizer or (count == self.step and t.optimizer is None)
                    ]
                )
            self.replay(optimizer)

    def after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        stepping = [count for count in self.counts.values() if count]
        if min(stepping) >= self.next_check:
            self.next_check = min(stepping) + CHECK_EVERY
            with torch.no_grad():
                self.check()
            if self.step >= 2 * CHECK_EVERY:
                self.forward.forget()

    def read_gradients(self, tensors: list[Tracked]) -> None:
        """Count who has a gradient; mark the sampled elements that have one; keep norms on the device."""
        dense = []
        for t in tensors:
            grad = t.param.grad
            if grad is None:
                t.no_gradient += 1
            elif grad.is_sparse:
                t.sparse = True
                t.with_gradient += 1
            else:
                dense.append(t)
        for bank in self.banks:
            here = [t for t in dense if t.param.device == bank.start.device]
            if not here:
                continue
            norms = torch._foreach_norm([t.param.grad for t in here])
            self.norms_waiting.append((here, torch.stack([norm.float() for norm in norms])))
            for t, place in zip(bank.tensors, bank.places, strict=True):
                if t in here:
                    bank.touched[place] |= t.param.grad.take(t.index) != 0

    def fetch_norms(self) -> None:
        for tensors, norms in self.norms_waiting:
            for t, norm in zip(tensors, norms.tolist(), strict=True):
                t.finite &= math.isfinite(norm)
                t.grad_norm = max(t.grad_norm, norm if math.isfinite(norm) else 0.0)
                t.with_gradient += norm != 0
                t.zero_gradient += norm == 0
        self.norms_waiting = []

    def replay(self, optimizer: Optimizer) -> None:
        """Add this update's intended displacement of 16-bit tensors to the window's."""
        for bank in self.banks:
            place_of = {id(t): place for t, place in zip(bank.tensors, bank.places, strict=True)}
            mine = [t for t in self.replayed if t.optimizer is optimizer and id(t) in place_of]
            mine = [t for t in mine if t.param.grad is not None and not t.param.grad.is_sparse]
            if intended.kind_of(optimizer) == "muon":
                for t in mine:
                    moved = intended.replay_matrix(optimizer, t.group, t.param)
                    bank.intended[place_of[id(t)]] += moved.take(t.index)
                    t.intended_known = True
                continue
            batches: dict[tuple, list[Tracked]] = {}
            for t in mine:  # one replay for a group's tensors of the same age
                batches.setdefault((id(t.group), bool(optimizer.state.get(t.param))), []).append(t)
            for batch in batches.values():
                params, indices = [t.param for t in batch], [t.index for t in batch]
                moved = intended.replay_elements(optimizer, batch[0].group, params, indices)
                for t, part in zip(batch, moved.split([len(i) for i in indices]), strict=True):
                    bank.intended[place_of[id(t)]] += part
                    t.intended_known = True

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
        for check in CHECKS:
            if at_start and not getattr(check, "static", False):
                continue
            for finding in check(state):
                if (finding.rule, finding.severity) not in self.said:
                    self.said.add((finding.rule, finding.severity))
                    new.append(finding)
        self.findings += new
        if self.log and new:
            with self.log.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(f.to_dict(), ensure_ascii=False) + "\n" for f in new))
        return new


def fetch(losses: list[Tensor | float]) -> list[float]:
    """Losses as floats; those on a device come over in one transfer."""
    if any(isinstance(loss, Tensor) for loss in losses):
        device = next(loss.device for loss in losses if isinstance(loss, Tensor))
        return torch.stack([torch.as_tensor(loss, device=device).float().mean() for loss in losses]).tolist()
    return list(losses)
