"""The tables of docs/health.md: from detection.json, healthy.json, operators.json and tools.json, by docs_table.py."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from benchmarks.detection import kind_of
from benchmarks.programs import alarms
from moe_lab.config import ROOT

NOT_YET = "Not measured yet: `make {}`."


def kept(name: str) -> dict[str, Any] | None:
    path = ROOT / "benchmarks" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def origin(found: dict[str, Any]) -> str:
    made = found["provenance"]
    return f"{made['updates']} updates, commit {made['commit']}, torch {made['torch']}."


def told(seed: dict[str, Any]) -> str:
    """What was said first, and the right thing if that came later."""
    if seed["first"] is None:
        return "nothing"
    who, rule, _, step = seed["first"]
    when = who if step is None else f"step {step}"
    later = "" if seed["right"] or seed["named"] is None else f", then `{seed['named'][1]}`"
    return f"`{rule}` ({when}){later}"


def detection() -> list[str]:
    found = kept("detection")
    if found is None:
        return [NOT_YET.format("detection")]
    lines = [origin(found)]
    for half, counts in found["summary"].items():
        rows = [line for line in found["rows"] if line["half"] == half]
        if not any(line["seeds"] for line in rows):
            lines += harm(half, rows)
            continue
        lines += ["", f"**{half}**: first finding right in "]
        parts = [
            f"{c['right_first']} of {c['runs']} {kind} runs ({c['rows']} rows)"
            for kind, c in counts.items()
            if kind != "twins"
        ]
        twins = counts["twins"]
        lines[-1] += (
            "; ".join(parts) + f". Of {twins['runs']} runs of healthy twins {twins['with_alarm']} had an alarm."
        )
        lines += ["", "| fault | kind of model | is | p | right | first finding, by seed | delay |", "| --- " * 7 + "|"]
        for line in rows:
            seeds = list(dict.fromkeys(map(told, line["seeds"])))
            delays = (
                [str(seed["delay"]) for seed in line["seeds"] if seed["delay"] is not None] if line["trigger"] else []
            )
            right = f"{sum(seed['right'] for seed in line['seeds'])} of {len(line['seeds'])}"
            cells = [
                line["row"],
                line["kind"],
                kind_of(line),
                "" if line["p"] is None else f"{line['p']:.3f}",
                right,
                "; ".join(seeds),
                ", ".join(delays),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def harm(half: str, rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a half on which no watch was run yet."""
    if not rows:
        return ["", f"**{half}**: not run yet."]
    counts = Counter(map(kind_of, rows))
    told = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    lines = ["", f"**{half}**: {told}; no watch was run on these rows yet.", ""]
    lines += ["| fault | kind of model | is | p | would be right |", "| --- " * 5 + "|"]
    for line in rows:
        right = ", ".join(f"`{rule}`" for rule in line["right"])
        lines.append(f"| {line['row']} | {line['kind']} | {kind_of(line)} | {line['p']:.3f} | {right} |")
    return lines


def healthy() -> list[str]:
    found = kept("healthy")
    if found is None:
        return [NOT_YET.format("healthy")]
    counts = found["summary"]
    share = counts["silent"] / counts["programs"]
    lines = [
        f"{origin(found)} Of {counts['programs']} programs {counts['silent']} were silent ({share:.1%}), {counts['with_warning']} "
        f"had a warning and {counts['with_error']} an error; {counts['left_out']} families of transformers do not run here in "
        "tiny form.",
        "",
        "| program | alarms |",
        "| --- | --- |",
    ]
    for row in found["programs"]:
        if loud := alarms(row):
            said = "; ".join(f"`{f[1]}` ({f[2]}, {'examine' if f[3] is None else f'step {f[3]}'})" for f in loud)
            lines.append(f"| {row['name']} | {said} |")
    return lines


def operators() -> list[str]:
    found = kept("operators")
    if found is None:
        return [NOT_YET.format("operators")]
    counts = found["summary"]
    well, wrapped = ("{with_alarm} of {runs}".format(**counts[twin]) for twin in ("None", "idle"))
    lines = [
        f"{origin(found)} defaultplusplus {counts['version']} ships {counts['operators']} operators. Alarms in {well} unharmed runs, and "
        f"in {wrapped} whose modules are wrapped as an operator does it, and compute as before.",
        "",
        "| outcome | pairs of operator and family | operators | cause named | anything said |",
        "| --- " * 5 + "|",
    ]
    for outcome in ("harm", "latent", "no effect", "does not apply"):
        c = counts[outcome]
        named = c["named"] if outcome in ("harm", "latent") else ""
        lines.append(f"| {outcome} | {c['pairs']} | {c['operators']} | {named} | {c['said_anything']} |")
    named, missed = [], []
    for pair in (pair for pair in found["pairs"] if pair["outcome"] in ("harm", "latent")):
        told = f"{pair['operator']} ({pair['family']})"
        if pair["named"]:
            named.append(f"{told} `{pair['named'][0]}`")
        elif pair["outcome"] == "harm":
            missed.append(told)
    return [*lines, "", f"Named: {', '.join(named)}. With harm and not named: {', '.join(missed)}."]


def tools() -> list[str]:
    found = kept("tools")
    if found is None:
        return [NOT_YET.format("tools")]
    lines = [origin(found)]
    for name, several in found["tools"].items():
        head = ("tool", "version", "caught, of the sick rows", "of the others", "false alarms on the twins", "fails on")
        lines += ["", f"**{name}**:", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
        for tool, line in several.items():
            caught = (f"{line['caught']} of {line['sick']}", f"{line['caught_latent']} of {line['latent']}")
            alarmed = f"{line['false_alarms']} of {line['tried']}"
            cells = (tool, found["provenance"]["versions"].get(tool, ""), *caught, alarmed, str(line["failed"]))
            lines.append("| " + " | ".join(cells) + " |")
    return lines


ALL = (detection, healthy, operators, tools)
