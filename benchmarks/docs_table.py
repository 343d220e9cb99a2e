"""Write what is generated in the documentation, between its marks: `make docs-table`.

The README's table of notebooks and each notebook's card come from the minutes that were measured, its lines of `make bench` from
benchmarks/results.json, as do those of docs/records.md, whose list comes from benchmarks/records.json; the tables of health's
own README from its rules and from benchmarks/watch_cost.json; those of docs/health.md in evidence_tables.py. What
was learned from them is written by hand, beside the marks. The course's pages: benchmarks/course_pages.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
from checks.machine_00 import read_minutes

from benchmarks import course_pages, evidence_tables, outputs
from moe_lab.config import ROOT
from moe_lab.course.runner import all_notebooks
from moe_lab.failures.results import load_results, spread
from moe_lab.health import RULES, SICKNESSES
from moe_lab.train.record import write_atomically

README = ROOT / "README.md"
HEALTH_README = ROOT / "moe_lab" / "health" / "README.md"
HEALTH_PAGE = ROOT / "docs" / "health.md"
RECORDS_PAGE = ROOT / "docs" / "records.md"


def filled(text: str, mark: str, lines: list[str]) -> str:
    """The text with these lines between `<!-- mark -->` and `<!-- /mark -->`. Raises ValueError if the marks are not there."""
    before, begin, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not begin or not end:
        raise ValueError(f"the marks <!-- {mark} --> and <!-- /{mark} --> are not there, each on a line of its own")
    return before + begin + "".join(f"{line}\n" for line in lines) + end + after


def measured(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def rules() -> list[str]:
    lines = ["| rule | at most | what it says |", "| --- | --- | --- |"]
    return lines + [f"| `{rule}` | {severity} | {text} |" for rule, (severity, text) in RULES.items()]


def sicknesses() -> list[str]:
    lines = ["| sickness | rule |", "| --- | --- |"]
    return lines + [f"| {sickness} | `{rule}` |" for sickness, rule in SICKNESSES.items()]


def cost() -> list[str]:
    """What a watch costs the lab's default run."""
    found = measured("watch_cost")
    median, low, high = (100 * found["cost"][key] for key in ("median", "low", "high"))
    origin = found["provenance"]
    return [
        f"In the lab's default run {median:.1f} % of an update (95 %: {low:.1f} to {high:.1f}) and "
        f"{100 * found['bytes_share']:.1f} % of the model's and the optimizers'",
        f"bytes (`make watch-cost`, commit {origin['commit']}, torch {origin['torch']}, {origin['threads']} threads of a "
        f"{origin['machine']} CPU).",
    ]


def disputed() -> list[str]:
    """A table of `designs.disputed`: what the other convention gives back of the loss, and what a good LR does."""
    found = load_results("disputed")
    lines = ["| row | the other convention | in the same, the LR that the sweeps found best |", "| --- | --- | --- |"]
    for name in (arm for arm in found.arms() if "repaired" not in arm):
        gains = [found.paired(name, f"{name}, {what} repaired") for what in ("convention", "LR")]
        lines.append(f"| {name.replace(', ', ', width ')} | {gains[0]} | {gains[1]} |")
    return lines


def number(found: dict, digits: int = 2) -> str:
    """A median with its interval."""
    median, low, high = (f"{found[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def bench_cells(rows: list[dict]) -> list[str]:
    """The line of one work: its rows are its dtypes and sizes."""
    first = rows[0]
    cells = [first["work"], f"{first['peer']} {first['way']}".strip(), first["goal"]]
    for dtype in ("float32", "bfloat16"):
        several = []
        for row in (row for row in rows if row["dtype"] == dtype):
            seconds = first["goal"].endswith(" s")
            found = [one["seconds_more" if seconds else "times_faster"] for one in row["threads"].values()]
            several.append((f"T {row['size']}: " if row["size"] else "") + " / ".join(map(number, found)))
        cells.append("; ".join(several))
    sizes = [[f"{n_bytes / 2**20:.0f}" for n_bytes in row["bytes"].values()] for row in rows if "bytes" in row]
    with_share = [(next(iter(row["threads"].values())), row["products"]) for row in rows if "products" in row]
    free = [times["times_faster"]["median"] / share for times, share in with_share]
    bounds = ["> 10" if bound > 10 else f"{bound:.2f}" for bound in free]  # then products hold nothing
    return [*cells, " / ".join(bounds), "; ".join(" : ".join(pair) for pair in sizes)]


def bench() -> list[str]:
    """Ten lines of `make bench`."""
    found, watch = measured("results"), measured("watch_cost")
    if "matrix_rate" not in found:
        return ["Not measured yet: `make bench`."]
    lines = [
        f"commit {found['commit']}, torch {found['torch']}, {found['machine']}, {found['cores']} cores. One thread (CPU time) / two "
        "(wall), the peer's time over ours, median and 95 % interval; MiB at the peak, ours : the peer's.",
        "",
        "| work | against | at least | float32 | bfloat16 | bound | MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for work in dict.fromkeys(row["work"] for row in found["rows"]):
        lines.append("| " + " | ".join(bench_cells([row for row in found["rows"] if row["work"] == work])) + " |")
    shares = {part["dtype"]: number({key: 100 * part["share"][key] for key in part["share"]}, 0) + " %"
              for part in found["matrix_rate"]}  # fmt: skip
    cells = [shares.get(dtype, "") for dtype in ("float32", "bfloat16")]
    lines.append("| the same training step | the matrix rate | 75 %, bf16 50 % | " + " | ".join(cells) + " | | |")
    cost = number({key: 100 * watch["cost"][key] for key in watch["cost"]})
    cells = [f"{cost} %" if dtype == watch["compute"] else "" for dtype in ("float32", "bfloat16")]
    return [*lines, "| a Watch on the default run | no Watch | 1 % | " + " | ".join(cells) + " | | |"]


def parts() -> list[str]:
    """Where a training step of Mixtral's shape spends its time."""
    found = measured("results").get("matrix_rate")
    if not found:
        return ["Not measured yet: `make bench`."]
    names = list(found[0]["parts_ms"])
    lines = ["| one thread | " + " | ".join(names) + " | step, ms | GFLOP/s of the products | of a step |"]
    lines.append("| --- " * (len(names) + 4) + "|")
    for part in found:
        times = [f"{100 * ms / part['step_ms']:.0f} %" for ms in part["parts_ms"].values()]
        rest = [
            f"{part['step_ms']:.0f}",
            f"{part['gflops_per_s']:.0f}",
            f"{1e3 * part['step_gflop'] / part['step_ms']:.0f}",
        ]
        lines.append("| " + " | ".join([part["dtype"], *times, *rest]) + " |")
    return lines


def records() -> list[str]:
    """The list of records, the oldest first; the first line is what they are compared with."""
    kept = json.loads((ROOT / "benchmarks" / "records.json").read_text(encoding="utf-8"))
    lines = ["| | what changed | commit | time (CPU time) | updates | seconds | loss | CPU, threads, products |"]
    lines.append("| --- " * 8 + "|")
    for index, line in enumerate(kept, 1):
        updates, seconds, loss = (
            spread(run[key] for run in line["runs"]["now"]) for key in ("step", "seconds", "loss")
        )
        ratio = f"{line['ratio_seconds']:.2f} ({line['ratio_cpu_seconds']:.2f}) × {line['against']}"
        cells = [
            str(index),
            line["what"],
            line["commit"],
            ratio,
            f"{updates.mean:.0f}",
            f"{seconds.mean:.0f}",
            str(loss),
        ]
        machine = f"{line['machine']}, {line['threads']}, {line['runs']['now'][0]['compute']}"
        lines.append("| " + " | ".join([*cells, machine]) + " |")
    return lines


def generated_pages() -> dict[Path, str]:
    """What the pages with generated parts should hold now (the README's table of notebooks and minutes apart)."""
    marks = {HEALTH_README: (rules, sicknesses, cost), HEALTH_PAGE: (disputed, *evidence_tables.ALL)}
    marks |= {README: (bench,), RECORDS_PAGE: (records, parts)} | course_pages.PARTS
    pages = {}
    for path, several in marks.items():
        pages[path] = path.read_text(encoding="utf-8")
        for part in several:
            pages[path] = filled(pages[path], part.__name__, part())
    return pages | {course_pages.SHEET: course_pages.sheet()}


def write_pages() -> None:
    for path, text in generated_pages().items():
        write_atomically(path, text)


def main() -> None:
    write_pages()
    minutes_of = read_minutes()
    rows = ["| notebook | question | minutes: smoke | lab |", "| --- | --- | --- | --- |"]
    for path in all_notebooks():
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0].source
        question = first.splitlines()[0].lstrip("# ").split("·", 1)[-1].strip()
        minutes = minutes_of["notebooks"].get(path.stem, {})
        smoke, lab = (minutes.get(name, "?") for name in ("smoke", "lab"))
        rows.append(f"| [{path.stem}](notebooks/{path.name}) | {question} | {smoke} | {lab} |")
        text = f"smoke {smoke} · lab {lab} ({minutes_of['reference']['machine']}); gpu: never measured"
        marks = {"minutes": text}
        notebook.cells[0].source = outputs.filled(first, marks.get)
        nbformat.write(notebook, path)
    rows += ["", f"Minutes on {minutes_of['reference']['machine']}; profile `gpu` was never measured."]
    write_atomically(README, filled(README.read_text(encoding="utf-8"), "notebooks", rows))


if __name__ == "__main__":
    main()
