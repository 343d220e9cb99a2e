"""Peers side by side: what other tools for sick trainings say of the judged rows. `make tools`, in an environment of its own.

Each row of two judged sets, the sick program and its healthy twin, seed 0, 100 updates. A tool that reads a log gets ours (loss, rate,
gradient norm and seconds, a line an update); one that looks at gradients is called before each update; one that patches the model or
takes features has a run of its own. All at their defaults, and nothing is asked of the cause: *caught* is any alarm on the sick run that
the twin does not have, *false alarm* is any alarm on the healthy twin. Seconds are of processor time, the tool's own.
Writes benchmarks/tools.json.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.detection import BODIES, STEPS, kind_of
from benchmarks.detection_rows import ROWS, THIRD, halves
from benchmarks.programs import HEALTH, Job, Program, alarms, kept, sources_of, watched
from moe_lab.config import ROOT
from moe_lab.failures.results import provenance, write_json

TOOLS = ("torch-audit", "torchdiag", "traintools", "training-doctor", "trainpulse", "trainspotter", "trainproof")
ENCODERS, DECODERS = {"BERT"}, {"Llama", "Mixtral", "Mamba", "GPT-2", "OPT", "Qwen2-MoE"}  # of defaultplusplus
SETS = ("judged", THIRD)  # rules were mended after the first had been looked at; the third was written later
EVERY = 10  # updates between looks of the tools that are asked to look now and then
NUMBER = re.compile(r"\b[\d.]+\b")  # in what a tool says: no alarm of its own
Told = dict[str, list[str]]  # tool → what it is alarmed by
Log = list[dict[str, float]]


def gradients(program: Program) -> list[torch.Tensor]:
    return [p.grad for p in program.model.parameters() if p.grad is not None]


# ---- tools that look at gradients, before an update ------------------------------------------------------------------


def by_torchdiag(program: Program, step: int) -> list[str]:
    import torchdiag

    if step % EVERY:
        return []
    stats = torchdiag.check_gradients(program.model)
    return [stat["status"] for stat in stats.values() if stat["status"] != "OK"]


def by_traintools(program: Program, step: int) -> list[str]:
    from traintools import GradientHealthMonitor

    lr = program.optimizers[0].param_groups[0]["lr"]
    result = GradientHealthMonitor(max_grad_norm=1.0).inspect(program.model, step=step, lr=float(lr))
    return [" ".join(warning.split()[1:4]) for warning in result.warnings]


# ---- tools that read a log -------------------------------------------------------------------------------------------


def by_training_doctor(log: Log, path: Path) -> list[str]:
    from training_doctor import Doctor

    doctor = Doctor()
    said = [diagnosis for line in log for diagnosis in doctor.log(**line)]
    return [diagnosis.problem for diagnosis in said if diagnosis.severity.name != "INFO"]


def by_trainpulse(log: Log, path: Path) -> list[str]:
    from trainpulse import Monitor

    monitor = Monitor()
    for line in log:
        for name, key in (("loss", "loss"), ("grad_norm", "grad_norm"), ("learning_rate", "lr")):
            if key in line:
                monitor.log(name, int(line["step"]), line[key])
    return [alert.detector for alert in monitor.report().alerts if alert.severity.name != "INFO"]


def by_trainspotter(log: Log, path: Path) -> list[str]:
    from trainspotter import load_run, run_all

    return [finding.detector for finding in run_all(load_run(str(path))) if str(finding.severity).lower() != "info"]


def by_trainproof(log: Log, path: Path) -> list[str]:
    from trainproof.epoch import check_epoch

    return [finding["id"] for finding in check_epoch(path)["findings"] if finding["level"] != "PASS"]


LOOKING = {"torchdiag": by_torchdiag, "traintools": by_traintools}
READING = {
    "training-doctor": by_training_doctor,
    "trainpulse": by_trainpulse,
    "trainspotter": by_trainspotter,
    "trainproof": by_trainproof,
}


def quietly(call: Callable[[], list[str]], told: Told, seconds: dict[str, float], tool: str) -> None:
    """What a tool says and how long it took; an error of its own is kept as `failed: …`, which is no alarm."""
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            said = call()
        except Exception as error:
            said = [f"failed: {type(error).__name__}: {error}"[:120]]
    seconds[tool] = seconds.get(tool, 0.0) + time.process_time() - began
    told.setdefault(tool, []).extend(said)


def logged(make: Callable[[int], Program]) -> dict[str, Any]:
    """One run under the tools that look at gradients, and what the others make of its log."""
    torch.manual_seed(0)
    program, told, seconds = make(0), {}, {}
    log: Log = []

    def before(optimizer: Any, args: tuple, kwargs: dict) -> None:
        if log and optimizer is program.optimizers[0] and "grad_norm" not in log[-1]:
            log[-1]["grad_norm"] = math.sqrt(sum(float(g.float().norm()) ** 2 for g in gradients(program)))
            for tool, look in LOOKING.items():
                quietly(lambda look=look: look(program, int(log[-1]["step"])), told, seconds, tool)

    handle = program.optimizers[0].register_step_pre_hook(before)
    for i in range(STEPS):
        began = time.process_time()
        log.append({"step": i})
        loss = float(program.step(i))
        log[-1] |= {"loss": loss, "lr": float(program.optimizers[0].param_groups[0]["lr"])}
        log[-1]["step_time"] = time.process_time() - began
    handle.remove()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in log))
        for tool, read in READING.items():
            quietly(lambda read=read: read(log, path), told, seconds, tool)
    return {"told": told, "seconds": seconds}


def audited(make: Callable[[int], Program]) -> list[str]:
    from torch_audit import autopatch

    torch.manual_seed(0)
    program = make(0)
    auditor = autopatch(
        program.model, optimizer=program.optimizers[0], every_n_steps=EVERY, suppress_internal_errors=True
    )
    for i in range(STEPS):
        program.step(i)
    return [finding.rule_id for finding in auditor.finish(report=False).findings if finding.severity.name != "INFO"]


def featured(make: Callable[[int], Program], arch: str) -> list[str]:
    """defaultplusplus: features of the run, and its own trained judge."""
    from defaultplusplus import FeatureExtractor
    from defaultplusplus.diagnosis import load_pretrained
    from defaultplusplus.processing import RuntimeNormalizer

    torch.manual_seed(0)
    program, seen = make(0), {}
    with contextlib.suppress(Exception):  # a state space model has no attention to show
        program.model.set_attn_implementation("eager")
    program.model.config.output_attentions = program.model.config.output_hidden_states = True
    program.model.config.architectures = [type(program.model).__name__]  # as a saved model's config has it

    def keep(model: Any, args: tuple, kwargs: dict, output: Any) -> None:
        seen.update({key: kwargs[key] for key in ("input_ids", "labels") if key in kwargs}, outputs=output)

    program.model.register_forward_hook(keep, with_kwargs=True)
    with FeatureExtractor(program.model, arch=arch) as extractor:
        look = lambda optimizer, *_: extractor.step(loss=seen["outputs"].loss.detach(), optimizer=optimizer, **seen)  # noqa: E731
        program.optimizers[0].register_step_pre_hook(lambda *args: look(*args) and None)
        for i in range(STEPS):
            program.step(i)
            if i % 20 == 19:
                extractor.epoch_end()
        features = extractor.finalize()
    encoded = RuntimeNormalizer.load(arch).encode(features, mode="raw")
    diagnosis = load_pretrained(arch).predict(encoded)
    return [f"{diagnosis.category}/{diagnosis.root_cause}"] if diagnosis.is_faulty else []


def tried(make: Callable[[int], Program], kind: str) -> dict[str, Any]:
    """All tools on one program."""
    found = logged(make)
    told, seconds = found["told"], found["seconds"]
    began = time.process_time()
    torch.manual_seed(0)
    program = make(0)
    for i in range(STEPS):
        program.step(i)
    alone = time.process_time() - began
    runs = {"torch-audit": partial(audited, make)}
    if kind in ENCODERS | DECODERS:
        runs["defaultplusplus"] = partial(featured, make, "encoder" if kind in ENCODERS else "decoder")
    for tool, run in runs.items():
        quietly(run, told, seconds, tool)
        seconds[tool] -= alone
    return {"told": {tool: sorted(set(said)) for tool, said in told.items()}, "seconds": seconds | {"alone": alone}}


def ours(make: Callable[[int], Program]) -> dict[str, Any]:
    run = watched(make, 0, STEPS)
    return {"told": {"health": sorted({finding[1] for finding in alarms(run)})}, "examined_s": run["seconds"][0]}


def jobs() -> list[Job]:
    split, found = halves(), []
    for row in (row for row in ROWS if split[row.name] in SETS):
        sources, own = sources_of("tools", *BODIES), inspect.getsource(inspect.getmodule(row.make))
        for sick in (True, False):
            make, name = partial(row.make, sick=sick), f"{row.name}: {'sick' if sick else 'healthy'}"
            found.append(Job(f"tools: {name}", 0, partial(tried, make, row.kind), sources, own))
            found.append(Job(f"health: {name}", 0, partial(ours, make), sources + HEALTH, own))
    return found


def table(runs: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tool → rows that it could be tried on, caught of the sick and of the latent ones, false alarms, rows on which it fails."""
    found: dict[str, dict[str, Any]] = {}
    for tool in ("health", *TOOLS, "defaultplusplus"):
        line = {"tried": 0, "sick": 0, "caught": 0, "latent": 0, "caught_latent": 0, "false_alarms": 0, "failed": 0}
        for row in rows:
            both = [
                runs.get(f"{'health' if tool == 'health' else 'tools'}: {row['row']}: {twin}", {})
                for twin in ("sick", "healthy")
            ]
            if any(tool not in run.get("told", {}) for run in both):
                continue
            if any(said.startswith("failed") for run in both for said in run["told"][tool]):
                line["failed"] += 1
                continue
            ill, well = ({NUMBER.sub("", said) for said in run["told"][tool]} for run in both)
            line["tried"] += 1
            kind = "sick" if kind_of(row) == "sick" else "latent"
            line[kind] += 1
            line["caught" if kind == "sick" else "caught_latent"] += bool(ill - well)
            line["false_alarms"] += bool(well)
        found[tool] = line
    return found


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = json.loads((ROOT / "benchmarks" / "detection.json").read_text(encoding="utf-8"))["rows"]
    runs = {run["name"]: run for run in kept(jobs(), "tools")}
    found = {name: table(runs, [row for row in rows if row["half"] == name]) for name in SETS}
    print(json.dumps(found, indent=2))
    versions = {tool: version(tool) for tool in (*TOOLS, "traincheck", "defaultplusplus")}
    made = provenance() | {"updates": STEPS, "versions": versions}
    told = [{key: run[key] for key in ("name", "commit", "told", "failed") if key in run} for run in runs.values()]
    write_json(ROOT / "benchmarks" / "tools.json", {"provenance": made, "tools": found, "runs": told})


if __name__ == "__main__":
    main()
