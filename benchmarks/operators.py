"""A judge that we did not write: the mutation operators that defaultplusplus ships for transformers models. `make operators`.

Each operator is applied, at the last value of its grid and to all layers, to three families in tiny random form, trained for 100
updates; examine and a Watch look on at their defaults. An operator *acts* if the run's losses differ from the unharmed run's of the
same seed, and does *harm* if a one-sided permutation test over five seeds shows a worse held-out loss. *Named*: a finding of at least
`warning` that its twin does not have; CAUSES says which rules would name the cause, and was written before the first run. The twin of
an operator that replaces `forward` of modules has the same modules wrapped, and nothing changed in them: what is said of the wrapping
is no merit. Runs in the environment of `make tools`; writes benchmarks/operators.json.
"""

from __future__ import annotations

import inspect
from functools import partial
from itertools import product
from typing import Any

import defaultplusplus
import torch
from defaultplusplus.deform.injection import DynamicFault
from defaultplusplus.deform.operator_impls.registry import get_injector
from defaultplusplus.deform.operators import OPERATORS

from benchmarks.detection import BODIES, HARM, STEPS, p_worse
from benchmarks.detection_bodies import Body, bert, language_model
from benchmarks.detection_twins import Loop
from benchmarks.programs import HEALTH, Job, Program, alarms, kept, sources_of, trained, watched
from moe_lab.config import ROOT
from moe_lab.failures.results import provenance, write_json

FAMILIES = {"bert": ("encoder", bert), "gpt2": ("decoder", None), "llama": ("decoder", None)}
SEEDS = (0, 1, 2, 3, 4)
CUT = ("no_gradient", "faint_gradient")
CAUSES = {  # operators, by what their code does → the rules that would name that; of all others health measures nothing
    "MZM MIM MRM MCB VEC": ("future_leak", "no_effect"),
    "QZQ QZK QZV VSH": CUT,
    "FDN": (*CUT, "alike_units"),
    "QFG": ("frozen_module",),
    "SPD RIN KMD": ("mode_mismatch",),
    "SUC": (*CUT, "nonfinite_gradient", "nonfinite_loss"),
    "POE PSI PTL": (*CUT, "no_effect", "rough_positions"),
    "CST COB CTR CLK": ("future_leak", "mode_mismatch"),
    "NZG RRS": (*CUT, "initial_loss"),
    "OZR FWI": (
        *CUT,
        "initial_loss",
        "alike_units",
    ),  # alike_units and norm_start: since a first run had been looked at
    "ETZ QTH": ("alike_units",),
    "NSG NSB": ("initial_loss", "norm_start"),
    "NCE": ("norm_start",),
    "FSW OSL ORI": ("initial_loss",),
    "RSR": ("scaled_copies", "initial_loss"),
}
WRAPPING = {operator for operator in OPERATORS if issubclass(get_injector(operator), DynamicFault)}
RIGHT = {operator: rules for operators, rules in CAUSES.items() for operator in operators.split()}


def family(name: str, seed: int) -> Body:
    """With an attention in plain operations and a mask that is passed on: operators change what they are handed."""
    _, make = FAMILIES[name]
    body = make(seed) if make else language_model(name, seed)
    body.model.set_attn_implementation("eager")

    def batches() -> dict[str, torch.Tensor]:
        batch = body.batches()
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    return body._replace(batches=batches)


def mutated(name: str, operator: str | None, idle: bool, seed: int) -> Program:
    """A family's healthy training, or the same with an operator's injector entered after the model was built."""
    body = family(name, seed)
    if operator:
        grid = OPERATORS[operator].param_grid
        injector = get_injector(operator, param_value=grid[-1] if grid else None)(body.model)
        if idle:
            injector._mutate_inputs, injector._mutate_output = lambda args, kwargs: (args, kwargs), lambda out: out
        injector.__enter__()
    return Loop(body).program()


def job(name: str, operator: str | None, seed: int, idle: bool = False) -> Job:
    sources = sources_of(*BODIES)
    run, files = (watched, sources + HEALTH) if seed == 0 or not operator else (trained, sources)
    own = inspect.getsource(family) + inspect.getsource(mutated)
    make = partial(mutated, name, operator, idle)
    return Job(f"{name} {operator}{' idle' * idle}", seed, partial(run, make, seed, STEPS), files, own)


def computed() -> dict[str, list[dict[str, Any]]]:
    """Runs by family and operator: one seed of each, and the others and the twins of those that change anything."""
    pairs = [
        (name, operator)
        for name, (scope, _) in FAMILIES.items()
        for operator in (None, *(key for key, o in OPERATORS.items() if o.scope in ("both", scope)))
    ]
    results = {run["name"]: [run] for run in kept([job(*pair, 0) for pair in pairs], "operators, seed 0")}
    acting = [pair for pair in pairs if pair[1] is None or acts(results, *pair)]
    jobs = [job(*pair, seed) for pair, seed in product(acting, SEEDS[1:])]
    jobs += [job(*pair, 0, idle=True) for pair in acting if pair[1] in WRAPPING]
    for run in kept(jobs, "operators, the other seeds and twins"):
        results.setdefault(run["name"], []).append(run)
    return results


def acts(results: dict[str, list[dict[str, Any]]], name: str, operator: str) -> bool:
    mine, other = results[f"{name} {operator}"][0], results[f"{name} None"][0]
    return "failed" not in mine and (mine["losses"], mine["held_out"]) != (other["losses"], other["held_out"])


def judged(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line an operator and family."""
    lines = []
    for label, runs in results.items():
        name, operator, *idle = label.split()
        if operator == "None" or idle:
            continue
        well = results[f"{name} None"]
        line = {"family": name, "operator": operator, "action": OPERATORS[operator].action}
        if failed := [run["failed"] for run in runs if "failed" in run]:
            lines.append(line | {"outcome": "does not apply", "why": failed[0]})
            continue
        usual = {finding[1] for finding in alarms(results.get(f"{label} idle", well)[0])}
        line["said"] = sorted({finding[1] for finding in alarms(runs[0])} - usual)
        if not acts(results, name, operator):
            lines.append(line | {"outcome": "no effect"})
            continue
        p = p_worse([run["held_out"] for run in runs], [run["held_out"] for run in well])
        named = [rule for rule in line["said"] if rule in RIGHT.get(operator, ())]
        lines.append(line | {"outcome": "harm" if p <= HARM else "latent", "p": round(p, 4), "named": named})
    return lines


def summary(lines: list[dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"operators": len(OPERATORS), "version": defaultplusplus.__version__}
    for twin in ("None", "idle"):
        runs = [alarms(run) for label, several in results.items() if label.endswith(twin) for run in several]
        found[twin] = {"runs": len(runs), "with_alarm": sum(map(bool, runs))}
    for outcome in ("harm", "latent", "no effect", "does not apply"):
        mine = [line for line in lines if line["outcome"] == outcome]
        found[outcome] = {
            "pairs": len(mine),
            "operators": len({line["operator"] for line in mine}),
            "named": sum(bool(line.get("named")) for line in mine),
            "said_anything": sum(bool(line.get("said")) for line in mine),
        }
    return found


def main() -> None:
    torch.set_num_threads(1)
    results = computed()
    lines, made = judged(results), provenance() | {"updates": STEPS}
    for line in lines:
        print(
            f"{line['family']:6} {line['operator']} {line['outcome']:15} {line.get('said', '')} {line['action'][:60]}"
        )
    print(found := summary(lines, results))
    write_json(ROOT / "benchmarks" / "operators.json", {"provenance": made, "summary": found, "pairs": lines})


if __name__ == "__main__":
    main()
