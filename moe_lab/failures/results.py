"""What runs measured: tables of rows with their spread over seeds, where numbers come from, and committed results."""

import json
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_lab.config import ROOT, ConfigError
from moe_lab.optim.products import has_fast_bfloat16
from moe_lab.train.record import commit, write_atomically

RESULTS = ROOT / "notebooks" / "results"


def provenance() -> dict[str, str | None]:
    """What computes here; it stands beside every number that is kept."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"commit": commit(), **versions, "machine": cpu_kind()}


def cpu_kind() -> str:
    """What decides about speed, such as `x86_64, AVX512, with bf16 units`."""
    units = "with" if has_fast_bfloat16(torch.device("cpu")) else "without"
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {units} bf16 units"


def origins(rows: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """All that rows say about where they come from."""
    return {key: sorted({str(row[key]) for row in rows}) for key in ("commit", "corpus", "torch", "machine")}


class Spread(NamedTuple):
    """Mean and standard deviation over seeds; `sd` is NaN for a single one."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.n == 1 else f"{self.mean:.3f} ± {self.sd:.3f}"


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    sd = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
    return Spread(sum(values) / len(values), sd, len(values))


class Results:
    """Rows of an experiment: one finished cell each, with what it measured and where it comes from."""

    def __init__(self, name: str, rows: Sequence[dict[str, Any]]):
        self.name, self.rows = name, list(rows)

    def loss(self, arm: str, seed: int, step: int | None = None) -> float:
        """Validation loss of one cell, nats per token; infinite if the run diverged. `step`: the last one by default."""
        row = next(row for row in self.rows if row["arm"] == arm and row["seed"] == seed)
        value = row["validation"].get(str(step or row["steps"]))
        return math.inf if value is None else value

    def losses(self, arm: str, step: int | None = None) -> Spread:
        return spread(self.loss(arm, seed, step) for seed in self.seeds(arm))

    def paired(self, arm: str, other: str, step: int | None = None) -> Spread:
        """Loss of `arm` minus that of `other`, seed by seed: what both share cancels."""
        seeds = [seed for seed in self.seeds(arm) if seed in self.seeds(other)]
        return spread(self.loss(arm, seed, step) - self.loss(other, seed, step) for seed in seeds)

    def seeds(self, arm: str) -> list[int]:
        return [row["seed"] for row in self.rows if row["arm"] == arm]

    def arms(self) -> list[str]:
        return list(dict.fromkeys(row["arm"] for row in self.rows))

    def provenance(self) -> str:
        """One line: how many runs, which commits, corpus, torch, minutes of one core."""
        found = {k: ", ".join(v if k == "machine" else v[:12] for v in some) for k, some in origins(self.rows).items()}
        made = f"commit {found['commit']}, corpus {found['corpus']}, torch {found['torch']}, {found['machine']}"
        minutes = sum(row["wall_s"] for row in self.rows) / 60
        return f"{self.name}: {len(self.rows)} runs, {made}, {minutes:.0f} minutes of one core"

    def save(self, path: Path) -> None:
        write_json(path, {"experiment": self.name, "rows": self.rows})


def write_json(path: Path, value: Any) -> None:
    """With a line for each row of a table, so that a row which changes is a line that changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value).replace("}, {", "},\n{") + "\n")


def plain(name: str, value: Any) -> Any:
    """As JSON holds it (numpy's, torch's and Spreads too), with six digits. Raises ConfigError if it is not finite."""
    if isinstance(value, Spread):
        value = {key: part for key, part in value._asdict().items() if key != "sd" or value.n > 1}
    elif isinstance(value, dict):
        return {str(key): plain(name, part) for key, part in value.items()}
    try:
        text = json.dumps(value, default=lambda array: array.tolist(), allow_nan=False)
    except ValueError:
        raise ConfigError(f"{name}={value!r} must be finite") from None
    return json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))


def load_results(name: str) -> Results:
    """Committed results. Raises ConfigError if there are none under that name."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise ConfigError(f"{path}: no committed results of that name; run the experiment with redo=True")
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Results(stored["experiment"], stored["rows"])
