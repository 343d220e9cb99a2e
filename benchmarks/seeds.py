"""The default run over three seeds, and once with bf16 parameters: `make seeds`, about 20 minutes on two cores.

Each run keeps its directory under runs/seeds/, and one that has finished is not repeated. Prints a table and writes
benchmarks/seeds.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import mean, stdev

from moe_lab.config import ROOT
from moe_lab.failures.results import write_json
from moe_lab.train import read_record

ARMS = {f"seed {seed}": [f"training.seed={seed}"] for seed in range(3)}
ARMS["seed 0, bf16 parameters"] = ["training.seed=0", "precision.parameters=bfloat16"]
KEPT = ("validation_loss", "trigram_loss", "bits_per_byte", "steps", "tokens", "wall_s", "seed", "commit", "corpus")


def result(name: str, overrides: list[str]) -> dict:
    folder = ROOT / "runs" / "seeds" / name.replace(" ", "_").replace(",", "")
    summary = folder / "summary.json"
    if not summary.exists() or json.loads(summary.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "moe_lab", "run", str(ROOT / "configs" / "lab.yaml"), *overrides]
        resume = ["--resume"] if (folder / "checkpoints").exists() and any((folder / "checkpoints").iterdir()) else []
        done = subprocess.run([*command, "--run-dir", str(folder), *resume])
        if done.returncode > 1:  # 1: it has trained, and a check found an error, as it must with bf16 parameters
            sys.exit(done.returncode)
    values = json.loads(summary.read_text())
    deviation = max(row["norm_deviation"] for row in read_record(folder) if "loss" in row)
    return {"arm": name} | {key: values[key] for key in KEPT} | {"largest_norm_deviation": deviation}


def main() -> None:
    rows = [result(name, overrides) for name, overrides in ARMS.items()]
    write_json(ROOT / "benchmarks" / "seeds.json", rows)
    print(f"{'run':26} {'validation':>10} {'trigram':>8} {'below by':>9} {'bits/byte':>10} {'norms moved by':>15}")
    for row in rows:
        below = row["trigram_loss"] - row["validation_loss"]
        print(
            f"{row['arm']:26} {row['validation_loss']:10.4f} {row['trigram_loss']:8.4f} {below:9.4f} "
            f"{row['bits_per_byte']:10.4f} {row['largest_norm_deviation']:15.4f}"
        )
    losses = [row["validation_loss"] for row in rows if "bf16" not in row["arm"]]
    print(f"validation loss over {len(losses)} seeds: mean {mean(losses):.4f}, SD {stdev(losses):.4f}")


if __name__ == "__main__":
    main()
