"""The runs of notebook 05: whether the main one is judged, and a small one for named failures to be switched on in.

Each failure is a patch from outside on a healthy trainer, and stays for good. A second watch begins with it.
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable, Mapping

import torch

from moe_lab.config import ROOT, differences, load_config
from moe_lab.course.notebook import Lab
from moe_lab.failures import bugs
from moe_lab.health import Watch
from moe_lab.health.findings import Finding
from moe_lab.optim import groups_of
from moe_lab.show.live import LiveRun
from moe_lab.train import Trainer
from moe_lab.train.device import bfloat16_products

FREE = ("training.seed", "training.device", "model.vocab_size", "precision.compute")  # what a judged run may differ in
AT, STEPS = 40, 80  # when a scripted failure is switched on, and the length of that run


class NothingToRead(Exception):
    """A run that was stopped before its first readings; in a notebook, one line."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def judged(lab: Lab, run: LiveRun, config: str) -> tuple[bool, bool]:
    """Whether the run is whole (finished, steered by nobody, with its profile's settings), and whether the claims about its
    numbers are judged: if it is whole and of profile lab. Prints which, and why. Raises NothingToRead."""
    if not any("loss" in row for row in run.rows) or not any(row.get("event") == "eval" for row in run.rows):
        raise NothingToRead(
            "stopped before the first readings: there is nothing to read below; run the two cells above again"
        )
    settings = load_config(lab.root / (config or f"configs/{lab.profile}.yaml"))
    changed = [line for line in differences(settings, run.trainer.config) if not line.startswith(FREE)]
    reasons = [f"the config is {config}"] if config else []
    reasons += ["it was stopped"] if run.state() != "finished" else []
    reasons += ["it was steered"] if (run.trainer.run_dir / "controls.jsonl").exists() else []
    reasons += [f"changed: {', '.join(changed)}"] if changed else []
    if reasons:
        print(f"no claim is made about this run: {'; '.join(reasons)}")
    elif lab.profile != "lab":
        print(f"a whole run of profile {lab.profile}: claims about the size of its numbers are made in profile lab")
    else:
        print("a whole run of profile lab: its claims are judged")
    return not reasons, not reasons and lab.profile == "lab"


# ---- failures that are switched on later ------------------------------------------------------------------------------


def lr_thirtieth(trainer: Trainer) -> None:
    """B02, late: the peak of every learning rate is a thirtieth of what it was."""
    for group in groups_of(trainer.optimizers):
        group["initial_lr"] /= 30


def bfloat16_parameters(trainer: Trainer) -> None:
    """B01, late: weights, and what the optimizers keep of them, are rounded to bf16."""
    bugs.cast_parameters(trainer.model)
    for optimizer in trainer.optimizers:
        for p, state in optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == p.shape:
                    state[name] = value.to(p.dtype)
    trainer.products = bfloat16_products(trainer.model, trainer.config.precision.compute, trainer.device)


def detached_branch(trainer: Trainer) -> None:
    """What the second layer's feed-forward part returns no longer carries a gradient."""
    bugs.detach_output(trainer.model, "layers.1.ffn")


def random_tokens(trainer: Trainer) -> None:
    """B08, late: every batch from here on is noise of the same shape."""
    batches, generator = trainer.batches, torch.Generator().manual_seed(0)
    read, n_tokens = batches.next_batch, trainer.config.model.vocab_size
    batches.next_batch = lambda: torch.randint(n_tokens, read().shape, generator=generator)


FAULTS: Mapping[str, Callable[[Trainer], None]] = {
    "LR ÷ 30": lr_thirtieth,
    "parameters to bf16": bfloat16_parameters,
    "a detached branch": detached_branch,
    "random tokens": random_tokens,
}


def second_watch(trainer: Trainer) -> Watch:
    """One that begins now."""
    return Watch(trainer.model, trainer.optimizers, trainer.n_steps, start_step=trainer.step, quiet=True)


def then_watch(fault: Callable[[Trainer], None]) -> Callable[[LiveRun], None]:
    """A button's act: the fault, and a watch that begins with it; the one that saw the start goes on."""

    def act(run: LiveRun) -> None:
        fault(run.trainer)
        run.add_watch(f"watch since step {run.trainer.step}:", second_watch(run.trainer))

    return act


ACTS = {name: then_watch(fault) for name, fault in FAULTS.items()}


def small_trainer(n_steps: int = STEPS, accumulate: int = 1) -> Trainer:
    """Of profile smoke's model, whatever this notebook's profile is: a run to break, or to take apart."""
    config = load_config(ROOT / "configs/smoke.yaml")
    training = {"steps": n_steps, "gradient_accumulation_steps": accumulate, "device": "cpu", "save_interval": 10**6}
    return Trainer(config.with_(training=training | {"eval_interval": 10**6}), tempfile.mkdtemp(prefix="sabotaged_"))


def in_a_line(finding: Finding) -> str:
    """What it is called and when, and on a second line what was measured, as far as a page is wide."""
    measured = textwrap.shorten(finding.message, 88, placeholder=" …")
    return f"{finding.severity}: {finding.rule} (step {finding.step})\n{'':10}{measured}"


def first_words(fault: str) -> dict[str, Finding | None]:
    """The first warning or error of the watch that began with the run, and of the one that began with the fault, in a run of
    STEPS updates in which `fault` is switched on after AT of them."""
    trainer = small_trainer()
    watches = {"since the start": Watch(trainer.model, trainer.optimizers, trainer.n_steps, quiet=True)}
    trainer.listeners.append(lambda row: [watch.observe(loss=row["loss"]) for watch in watches.values()])
    for _ in trainer.steps(until=AT):
        pass
    FAULTS[fault](trainer)
    watches["since the fault"] = second_watch(trainer)
    for _ in trainer.steps():
        pass
    serious = {name: [f for f in watch.findings if f.severity != "info"] for name, watch in watches.items()}
    return {name: found[0] if found else None for name, found in serious.items()}
