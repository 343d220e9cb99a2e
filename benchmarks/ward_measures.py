"""What can be ordered of a run in the ward, measured from what it recorded, from its model and from the batches it was fed.

Nothing here knows what was planted. Each measurement is a function of a `Trained` that returns readings by name, findings
and the lines that a reader sees.
"""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab import Trainer, health
from moe_lab.__main__ import HEALTH_SCHEMA
from moe_lab.data import validation_windows
from moe_lab.health import Finding, choices
from moe_lab.health.measures import collisions
from moe_lab.model.depth import Chosen, Depth

N_BATCHES = 24  # of the run's own, after its end, for the data check
CUTS = (16, 32, 48)  # tokens from here on are changed
LAST = 20  # updates that "the last" is a mean of
EVERY = 4  # updates between those that a curve keeps


class Trained(NamedTuple):
    """A run at its end."""

    trainer: Trainer
    rows: Sequence[dict]  # its record
    floors: dict[str, float]  # of the text that its config names
    config: Path  # the file, as its author left it
    findings: Sequence[Finding]  # of the watch that saw it
    table: str  # that watch's report


def result(
    lines: Sequence[str], readings: dict[str, float], findings: Sequence[Finding] = (), drawn: Any = None
) -> dict[str, Any]:
    """A measurement as it is kept. Readings have four digits, so that a file does not hang on the machine's last bits."""
    rules = list(dict.fromkeys(f.rule for f in findings if f.severity != "info"))
    rounded = {name: float(f"{value:.4g}") for name, value in readings.items()}
    return {"lines": list(lines), "readings": rounded, "rules": rules, "drawn": drawn}


def told(findings: Sequence[Finding]) -> list[str]:
    """Findings without the folder of their file."""
    return [str(finding).replace("\n", " ") for finding in findings if finding.severity != "info"] or ["no findings"]


def floors(run: Trained) -> dict[str, Any]:
    steps = [row for row in run.rows if "loss" in row]
    weights = run.trainer.config.model.aux_loss_weights
    scale = sum(weights) / weights[0]
    next_token = [scale * row["losses"]["next_token"] for row in steps]
    first, last = next_token[0], float(np.mean(next_token[-LAST:]))
    evaluated = [(row["step"], row["validation_loss"]) for row in run.rows if "validation_loss" in row]
    validation = evaluated[-1][1]
    model = run.trainer.config.model
    start = run.floors["uniform"] + model.d_model * model.init_std**2 / 2
    readings = {"start_off": abs(first - start), "from_uniform": abs(validation - run.floors["uniform"])}
    readings |= {f"above_{name}": validation - run.floors[name] for name in ("unigram", "trigram")}
    listed = ", ".join(f"{name} {loss:.2f}" for name, loss in run.floors.items())
    beaten = [name for name, loss in run.floors.items() if validation < loss]
    lines = [
        f"tables, nats per token: {listed}",
        f"first training loss {first:.2f} (a fresh model: {start:.2f}); last {last:.2f}; validation {validation:.2f}",
        f"on validation text the model is below: {', '.join(beaten) or 'none of the tables'}",
    ]
    curve = [[row["step"], round(loss, 3)] for row, loss in zip(steps, next_token, strict=True)][::EVERY]
    drawn = {"training": curve, "validation": [[step, round(loss, 4)] for step, loss in evaluated]}
    return result(lines, readings | {"validation_gap": validation - last}, drawn=drawn)


def preflight(run: Trained) -> dict[str, Any]:
    found = health.preflight(run.config, sum(p.numel() for p in run.trainer.model.parameters()), HEALTH_SCHEMA)
    found = [Finding(**f.to_dict() | {"where": f.where.rpartition("/")[2]}) for f in found]
    lines = [line.replace(str(run.config), "config.yaml") for line in told(found)]
    return result(lines, {"findings": len([f for f in found if f.severity != "info"])}, found)


def record(run: Trained) -> dict[str, Any]:
    steps = [row for row in run.rows if "loss" in row]
    load = np.array([row["expert_load"] for row in steps])  # (updates, layers, experts), shares
    load = load * load.shape[-1]
    last = load[-LAST:].mean(axis=0)
    rates = [{name: row["lr"][name] for name in row["lr"]} for row in steps]
    peak = max(max(row.values()) for row in rates)
    first, half = (max(rates[n].values()) / peak for n in (0, len(rates) // 2))
    norms = [row["grad_norm"] for row in steps]
    readings = {"least_load": last.min(), "first_lr": first, "half_lr": half}
    numbered = zip(run.trainer.config.model.moe_layers, last, strict=True)
    listed = [f"MoE layer {n}: " + " ".join(f"{value:.2f}" for value in layer) for n, layer in numbered]
    lines = [
        f"load over the even share, mean of the last {LAST} updates (1 is even):",
        *listed,
        f"learning rate of update 1 over the peak: {first:.2f}; half-way: {half:.2f}",
        f"gradient norm before clipping: median {np.median(norms):.2f}, largest {max(norms):.2f}",
    ]
    means = [part.mean(axis=0).round(2).tolist() for part in np.array_split(load, len(load) // LAST)]
    return result(lines, readings, drawn=means)


def tokens(run: Trained) -> dict[str, Any]:
    batches = torch.stack([run.trainer.batches.next_batch() for _ in range(N_BATCHES)])
    vocabulary = run.trainer.dataset.vocab_size
    stream = batches[..., :-1].flatten().numpy()
    counts = np.bincount(stream, minlength=vocabulary)
    n = len(stream)
    equal = collisions(batches[..., :-1], vocabulary)
    shuffled = stream.copy()
    random.Random(0).shuffle(shuffled)
    packed, loose = (len(zlib.compress(ids.astype(np.uint16).tobytes(), 9)) for ids in (stream, shuffled))
    same = (batches[..., 1:] == batches[..., :-1]).float().mean().item()
    windows = [ids.numpy().tobytes() for batch in batches for ids in batch]
    repeated = 1 - len(set(windows)) / len(windows)
    readings = {"collisions": equal, "commonest": counts.max() / n, "repeated": repeated}
    lines = [
        f"collisions × vocabulary {equal:.2f} (1: every token equally likely)",
        f"compressed size over that of the same tokens shuffled {packed / loose:.3f} (1: their order says nothing)",
        f"the commonest token is {counts.max() / n:.1%} of all; {same:.1%} of tokens repeat the one before",
        f"{repeated:.0%} of {len(windows)} windows stood in an earlier batch",
    ]
    return result(lines, readings)


def inspection(run: Trained) -> dict[str, Any]:
    path = next(iter(sorted((run.trainer.run_dir / "checkpoints").glob("step_*.pt"))[::-1]))
    found = health.inspect_checkpoint(path)
    state = torch.load(path, weights_only=True)
    weights, start = state["model_state_dict"], state["initial_sample"]
    still, moved = [], {}
    for name, kept in start.items():
        before, now = kept["value"].float(), weights[name].flatten()[kept["index"]].float()
        kind = health_kind(name)
        moved.setdefault(kind, []).append(
            ((now - before).square().mean() / before.square().mean().clamp(min=1e-12)).sqrt()
        )
        still += [name] if torch.equal(before, now) else []
    formats = sorted({str(t.dtype).removeprefix("torch.") for t in weights.values() if t.is_floating_point()})
    far = {kind: float(torch.stack(values).mean()) for kind, values in moved.items()}
    kinds = ", ".join(f"{kind} {value:.1%}" for kind, value in far.items())
    lines = [*told(found), f"format of the weights: {', '.join(formats)}", f"moved, of their own size: {kinds}"]
    return result(lines, {"still": len(still), "tensors": len(start)}, found)


def health_kind(name: str) -> str:
    parts = name.split(".")
    if "norm" in name:
        return "norms"
    if parts[0] in ("embedding", "lm_heads"):
        return parts[0]
    return "routers" if "router" in name or "predictor" in name else f"{parts[2]}s".replace("seq_layers", "mixers")


def watch(run: Trained) -> dict[str, Any]:
    table, ends = run.table.splitlines(), ("error: ", "warning: ", "info: ", "no findings", "not checked: ")
    lines = [*told(run.findings), *takewhile(lambda line: not line.startswith(ends), table)]
    return result(lines, {"errors": sum(f.severity == "error" for f in run.findings)}, run.findings)


def examine(run: Trained) -> dict[str, Any]:
    ids = run.trainer.batches.next_batch()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return sum(model.losses(torch.cat([batch[0], batch[1][:, -1:]], dim=1)).values())

    examined = health.examine(run.trainer.model, (ids[:, :-1], ids[:, 1:]), loss)
    untried = [f"not checked: {what}: {why}" for what, why in examined.not_checked.items()]
    return result([*told(examined.findings), *untried], {"findings": len(examined.findings)}, examined.findings)


# ---- perturbation ----------------------------------------------------------------------------------------------------


def plain_copy(model: nn.Module) -> nn.Module:
    """In float32, without dropout."""
    twin = copy.deepcopy(model).float()
    for module in twin.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return twin


@contextmanager
def skipped_tokens(changed: list[int]) -> Iterator[None]:
    """Counts, for every MoD sublayer within, the tokens that it did not choose and that did not pass as they were."""
    true = Depth.put_back

    def put_back(self: Depth, x: Tensor, y: Tensor, rows: Chosen) -> Tensor:
        after = true(self, x, y, rows)
        passed = torch.ones(x.shape[:2], dtype=torch.bool).scatter_(1, rows.positions, False)
        changed.append(int((after != x).any(dim=-1)[passed].sum()))
        return after

    with patch.object(Depth, "put_back", put_back):
        yield


def in_each_mode(twin: nn.Module, ids: Tensor) -> tuple[dict[str, float], list[str]]:
    """The loss of the same tokens in training and in evaluation, and the modules that computed in one of them only."""
    modules = {name: m for name, m in twin.named_modules() if any(True for _ in m.parameters())}
    losses, used = {}, {}
    for mode in ("training", "evaluation"):
        seen = used[mode] = set()
        handles = [
            m.register_forward_hook(lambda *_, name=name, seen=seen: seen.add(name)) for name, m in modules.items()
        ]
        logits = twin.train(mode == "training")(ids[:, :-1]).logits
        losses[mode] = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        for handle in handles:
            handle.remove()
    return losses, sorted(used["training"] ^ used["evaluation"])


def heard(twin: nn.Module, ids: Tensor, vocab_size: int, training: bool, hold: bool) -> float:
    """Largest change of a logit before the first changed token, over the logits' deviation. `hold`: every top-k takes the
    places that it took before the change, which leaves what computation itself lets through."""
    twin.train(training)
    kept: list[Tensor] = []
    with choices.recorded(kept):
        before = twin(ids).logits
    worst = 0.0
    for cut in CUTS:
        changed = ids.clone()
        changed[:, cut:] = (changed[:, cut:] + 1 + torch.arange(ids.shape[1] - cut) % 7) % vocab_size
        with choices.held(kept) if hold else nullcontext():
            after = twin(changed).logits
        worst = max(worst, ((after - before)[:, :cut].abs().max() / before.std()).item())
    return worst


@torch.no_grad()
def perturbation(run: Trained) -> dict[str, Any]:
    trainer, twin = run.trainer, plain_copy(run.trainer.model)
    ids = next(validation_windows(trainer.dataset.validation, trainer.config.model.max_seq_len, 8))
    losses, one_sided = in_each_mode(twin, ids)
    ids, vocab_size, changed = ids[:, :-1], trainer.dataset.vocab_size, []
    with skipped_tokens(changed):
        twin.train()(ids)
    largest = {
        "in evaluation": heard(twin, ids, vocab_size, training=False, hold=False),
        "in training": heard(twin, ids, vocab_size, training=True, hold=False),
        "in training, every choice held": heard(twin, ids, vocab_size, training=True, hold=True),
    }
    leak = max(largest["in evaluation"], largest["in training, every choice held"])
    such = f", such as {one_sided[0]}" if one_sided else ""
    lines = [
        "a later token changed: largest change of an earlier logit, over the logits' standard deviation",
        *(f"  {where}: {value:.2g}" for where, value in largest.items()),
        f"the same tokens: loss {losses['training']:.3f} in training mode, {losses['evaluation']:.3f} in evaluation",
        f"modules that compute in one mode only: {len(one_sided)}{such}",
        f"tokens that MoD skipped and that did not pass as they were: {sum(changed)}",
    ]
    readings = {"leak": leak, "one_mode_only": len(one_sided), "skipped_changed": sum(changed)}
    return result(lines, readings, drawn=largest | {"loss": losses})


def branch_probe(run: Trained) -> dict[str, Any]:
    trainer = run.trainer
    trainer.model.train()
    batches = [trainer.batches.next_batch() for _ in range(54)]

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return sum(model.report(ids).terms.values())

    branches = health.branch_probe(trainer.model, trainer.optimizers, loss, batches)
    found = health.branch_findings(branches)
    sure = max((b.gain - 3 * b.error for b in branches if np.isfinite(b.gain)), default=-99.0)
    lines = [f"{b.name}: gains {b.gain:+.3f} ± {b.error:.3f} nats in 30 updates" for b in branches]
    drawn = [[b.name, finite(b.gain), finite(b.error)] for b in branches]
    return result([*told(found), *lines], {"gain": sure}, found, drawn)


def finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


MEASURES: dict[str, Callable[[Trained], dict[str, Any]]] = {
    m.__name__: m for m in (preflight, floors, tokens, record, inspection, perturbation, examine, watch, branch_probe)
}
