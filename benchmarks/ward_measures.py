"""What can be ordered of a run in the ward, measured from what it recorded, from its model and from the batches it was fed.

Nothing here knows what was planted. Each measurement is a function of a `Trained` that returns readings by name, findings
and the lines that a reader sees.
"""

from __future__ import annotations

import copy
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from moe_lab import Trainer, health
from moe_lab.__main__ import HEALTH_SCHEMA
from moe_lab.data import validation_windows
from moe_lab.health import Finding

N_BATCHES = 24  # of the run's own, after its end, for the data check
CUTS = (16, 32, 48)  # tokens from here on are changed
IDLE = 0.1  # share of the mean load below which an expert counts as idle


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
    first, last = (
        scale * float(np.mean([r["losses"]["next_token"] for r in some])) for some in (steps[:1], steps[-20:])
    )
    validation = next(row["validation_loss"] for row in reversed(run.rows) if "validation_loss" in row)
    readings = {"first": first, "training": last, "validation": validation}
    readings |= {f"above_{name}": validation - floor for name, floor in run.floors.items()}
    readings |= {"first_over_uniform": first / run.floors["uniform"], "gap": validation - last}
    listed = ", ".join(f"{name} {loss:.2f}" for name, loss in run.floors.items())
    beaten = [name for name, loss in run.floors.items() if validation < loss]
    lines = [
        f"floors, nats per token: {listed}",
        f"first training loss {first:.2f}; last: training {last:.2f}, validation {validation:.2f} (next token)",
        f"on validation text the model is below: {', '.join(beaten) or 'none of the tables'}",
    ]
    return result(lines, readings)


def preflight(run: Trained) -> dict[str, Any]:
    found = health.preflight(run.config, sum(p.numel() for p in run.trainer.model.parameters()), HEALTH_SCHEMA)
    found = [Finding(**f.to_dict() | {"where": f.where.rpartition("/")[2]}) for f in found]
    lines = [line.replace(str(run.config), "config.yaml") for line in told(found)]
    return result(lines, {"findings": len([f for f in found if f.severity != "info"])}, found)


def experts(run: Trained) -> dict[str, Any]:
    steps = [row for row in run.rows if "loss" in row]
    load = np.array([row["expert_load"] for row in steps])  # (updates, layers, experts), shares
    last = load[-20:].mean(axis=0) * load.shape[-1]
    readings = {"busiest": last.max(), "idle": int((last < IDLE).sum())}
    listed = [f"MoE layer {n}: " + " ".join(f"{value:.2f}" for value in layer) for n, layer in enumerate(last)]
    lines = ["load over the even share, mean of the last 20 updates (1 is even):", *listed]
    every = np.linspace(0, len(load) - 1, 24).astype(int)
    return result(lines, readings, drawn=(load[every] * load.shape[-1]).round(2).tolist())


def data(run: Trained) -> dict[str, Any]:
    batches = torch.stack([run.trainer.batches.next_batch() for _ in range(N_BATCHES)])
    vocabulary = run.trainer.dataset.vocab_size
    stream = batches[..., :-1].flatten().numpy()
    counts = np.bincount(stream, minlength=vocabulary)
    n = len(stream)
    collisions = vocabulary * float((counts * (counts - 1)).sum()) / (n * (n - 1))
    shuffled = stream.copy()
    random.Random(0).shuffle(shuffled)
    packed, loose = (len(zlib.compress(ids.astype(np.uint16).tobytes(), 9)) for ids in (stream, shuffled))
    same = (batches[..., 1:] == batches[..., :-1]).float().mean().item()
    readings = {"collisions": collisions, "compressed": packed / loose, "commonest": counts.max() / n, "repeated": same}
    lines = [
        f"collisions × vocabulary {collisions:.2f} (1: every token equally likely)",
        f"compressed size over that of the same tokens shuffled {packed / loose:.3f} (1: their order says nothing)",
        f"the commonest token is {counts.max() / n:.1%} of all; {same:.1%} of tokens repeat the one before",
    ]
    return result(lines, readings)


def inspect(run: Trained) -> dict[str, Any]:
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
    lines = [*told(run.findings), *run.table.splitlines()[:1]]
    return result(lines, {"errors": sum(f.severity == "error" for f in run.findings)}, run.findings)


# ---- modes and causality ---------------------------------------------------------------------------------------------


def plain_copy(model: nn.Module) -> nn.Module:
    """In float32, without dropout."""
    twin = copy.deepcopy(model).float()
    for module in twin.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    return twin


def sample_of(run: Trained) -> Tensor:
    """A few windows of what the run was validated on, (8, T + 1)."""
    trainer = run.trainer
    return next(validation_windows(trainer.dataset.validation, trainer.config.model.max_seq_len, 8))


@torch.no_grad()
def modes(run: Trained) -> dict[str, Any]:
    twin, ids, losses, used = plain_copy(run.trainer.model), sample_of(run), {}, {}
    modules = {name: m for name, m in twin.named_modules() if any(True for _ in m.parameters())}
    for mode in ("training", "evaluation"):
        seen: set[str] = set()
        handles = [
            m.register_forward_hook(lambda *_, name=name, seen=seen: seen.add(name)) for name, m in modules.items()
        ]
        twin.train(mode == "training")
        logits = twin(ids[:, :-1]).logits
        losses[mode] = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        used[mode] = seen
        for handle in handles:
            handle.remove()
    one_sided = sorted(used["training"] ^ used["evaluation"])
    evaluations = [row for row in run.rows if "mod_agreement" in row]
    agreement = min(evaluations[-1]["mod_agreement"]) if evaluations else float("nan")
    readings = {"gap": losses["evaluation"] - losses["training"], "one_sided": len(one_sided)}
    agreed = f"{agreement:.0%} at the least" if evaluations else "none was recorded"
    lines = [
        f"loss of the same validation tokens: {losses['training']:.3f} in training mode, {losses['evaluation']:.3f} in evaluation",
        f"modules that run in one mode only: {len(one_sided)}" + (f", such as {one_sided[0]}" if one_sided else ""),
        f"agreement of MoD's two ways to choose tokens, by router: {agreed}",
    ]
    return result(lines, readings, drawn=losses)


@contextmanager
def choices(kept: list[Tensor], replay: bool) -> Iterator[None]:
    """Every top-k within keeps the places that it chose, or takes those that were kept."""
    true, waiting = Tensor.topk, list(kept)

    def topk(self: Tensor, k: int, dim: int = -1, **options: Any):
        chosen = true(self, k, dim=dim, **options)
        if not replay:
            kept.append(chosen.indices)
            return chosen
        places = waiting.pop(0)
        return type(chosen)((self.gather(dim, places), places))

    with patch.object(Tensor, "topk", topk):
        yield


@torch.no_grad()
def causality(run: Trained) -> dict[str, Any]:
    """Largest change of a logit before the first changed token, over the logits' deviation: in evaluation; in training;
    in training with every discrete choice held as it was, which leaves what computation itself lets through."""
    twin, ids = plain_copy(run.trainer.model), sample_of(run)[:, :-1]
    vocabulary, largest = run.trainer.dataset.vocab_size, {}
    for name, training, hold in (("evaluation", False, False), ("training", True, False), ("held", True, True)):
        twin.train(training)
        kept: list[Tensor] = []
        with choices(kept, replay=False):
            before = twin(ids).logits
        worst = 0.0
        for cut in CUTS:
            changed = ids.clone()
            changed[:, cut:] = (changed[:, cut:] + 1 + torch.arange(ids.shape[1] - cut) % 7) % vocabulary
            if hold:
                with choices(kept, replay=True):
                    after = twin(changed).logits
            else:
                after = twin(changed).logits
            worst = max(worst, ((after - before)[:, :cut].abs().max() / before.std()).item())
        largest[name] = worst
    lines = [
        "largest change of a logit before the first changed token, over the logits' standard deviation:",
        *(f"{words}: {largest[name]:.2g}" for name, words in (("evaluation", "in evaluation mode"),
          ("training", "in training mode (a top-k over time looks ahead)"), ("held", "in training mode, every choice held"))),
    ]  # fmt: skip
    return result(lines, largest | {"leak": max(largest["evaluation"], largest["held"])}, drawn=largest)


def probe(run: Trained) -> dict[str, Any]:
    trainer = run.trainer
    trainer.model.train()
    batches = [trainer.batches.next_batch() for _ in range(54)]

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return sum(model.report(ids).terms.values())

    branches = health.branch_probe(trainer.model, trainer.optimizers, loss, batches)
    found = health.branch_findings(branches)
    best = max(branches, key=lambda branch: branch.gain)
    lines = [f"{b.name}: {b.gain:+.3f} ± {b.error:.3f} nats lower after 30 updates" for b in branches]
    drawn = [[b.name, finite(b.gain), finite(b.error)] for b in branches]
    return result([*told(found), *lines], {"gain": max(best.gain, -99.0)}, found, drawn)


def finite(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


MEASURES: dict[str, Callable[[Trained], dict[str, Any]]] = {
    m.__name__: m for m in (floors, preflight, experts, data, inspect, modes, causality, watch, probe)
}
