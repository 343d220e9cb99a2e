"""How long a training takes to a loss that is worth something: `make record`, some 20 minutes on an idle machine.

Measured is the time of the updates (no evaluation, no saving) until the validation loss is MARGIN below the trigram
table's, everything on: configs/lab.yaml of this checkout against that of an older commit, whose own code runs it, in
turn and seed by seed. All go to the older one's target and are scored on the same text. Prints the ratio.

    make record                        # against FIRST
    make record KEPT="what changed"    # and adds a line to benchmarks/records.json and docs/records.md
    make record AGAINST=d51ef39        # against another commit
    make record OF="75824a7 now" KEPT="kernels; the rest"    # several codes in one rotation, a line each
    make record PARAMS="precision.compute=float32"    # all with a changed config
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

MARGIN = 0.3  # nats
INTERVAL = 25  # updates between two evaluations, and before FIRST_LOOK none: looking took as long as training
FIRST_LOOK = 400
SEEDS = 3
FIRST = "be5cd36"  # what every record is compared with
CLOCKS = ("seconds", "cpu_seconds")  # of the wall; of all threads: on a busy machine the steadier one, with one thread


def spent(rows: Iterable[dict], clock: str) -> float:
    """Time of a record's updates alone: `clock` is cumulative in the rows of updates and of evaluations alike."""
    total = before = 0.0
    for row in rows:
        total += row[clock] - before if "loss" in row else 0.0
        before = row[clock]
    return total


# ---- in a process of its own, with the moe_lab of either tree ----


def train(folder: str, seed: int, target: float | None, overrides: list[str]) -> dict:
    """One training to the target (None: this tree's own), or to its end. Uses what the oldest tree has, too."""
    from moe_lab import Trainer, load_config

    class Late(Trainer):
        def evaluate_if_due(self) -> None:
            if self.step >= FIRST_LOOK:
                super().evaluate_if_due()

    sparse = [f"training.eval_interval={INTERVAL}", "training.save_interval=1000000", f"training.seed={seed}"]
    rows: list[dict] = []

    def listen(row: dict) -> None:
        nonlocal target
        rows.append(row | {"cpu_seconds": time.process_time() - begun})
        if target is None:
            target = trainer.floors["trigram"] - MARGIN
        if row.get("validation_loss", target + 1) <= target:
            trainer.stop()

    trainer = Late(load_config("configs/lab.yaml", overrides=[*sparse, *overrides]), folder, listeners=[listen])
    begun = time.process_time()
    trainer.fit()
    last = next(row for row in reversed(rows) if "validation_loss" in row)
    return {
        "seed": seed,
        "step": last["step"],
        "loss": last["validation_loss"],
        "target": target,
        **{clock: round(spent(rows, clock), 2) for clock in CLOCKS},
        "compute": trainer.config.precision.compute,
        "targets_crc": zlib.crc32(trainer.dataset.validation.tobytes()),  # of what was scored
    }


# ---- here ----


def train_in(tree: Path, seed: int, target: float | None, overrides: list[str]) -> dict:
    """`train` by the code that lies in `tree`. Ends this process where it fails or misses the target."""
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps([f"{folder}/run", seed, target, overrides])
        command = [sys.executable, __file__, "train", request]
        paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]  # the tree's own moe_lab comes first
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    run = json.loads(done.stdout.splitlines()[-1])
    if run["loss"] > run["target"]:
        sys.exit(f"{tree}, seed {seed}: it ended at {run['loss']:.4f}, the target is {run['target']:.4f}")
    return run


def tree_of(root: Path, commit: str) -> Path:
    """A checkout of `commit`, made once."""
    tree = root / ".cache" / "trees" / commit
    if not tree.exists():
        subprocess.run(["git", "-C", root, "worktree", "add", "--force", "--detach", tree, commit], check=True)
    return tree


def compare(
    root: Path, commit: str, overrides: list[str], of: Sequence[str] = ("now",), seeds: int = SEEDS
) -> list[dict]:
    """The runs of `commit` and of each code in `of` (a commit, or "now"), seed by seed, the order changed each time.

    Returns, for each of `of`, the ratios of its mean times to those of `commit`, with the runs of both.
    """
    trees = {name: root if name == "now" else tree_of(root, name) for name in [commit, *of]}
    runs: dict[str, list[dict]] = {name: [] for name in trees}
    target = None
    for seed in range(seeds):
        for name in list(trees)[:: -1 if seed % 2 else 1]:
            run = train_in(trees[name], seed, target, overrides)
            target = run["target"]
            runs[name].append(run)
            time_s = f"{run['seconds']:6.1f} s (CPU {run['cpu_seconds']:.1f} s)"
            print(f"{name:8} seed {seed}: {time_s}, {run['step']} updates, {run['loss']:.4f}", flush=True)
    before = runs[commit]
    return [{"against": commit, **ratios(before, runs[n]), "runs": {commit: before, "now": runs[n]}} for n in of]


def ratios(before: list[dict], now: list[dict]) -> dict[str, float]:
    """Mean time now over mean time before, on both clocks. Raises ValueError where they were scored on different texts."""
    if len({run["targets_crc"] for run in [*before, *now]}) > 1:
        raise ValueError("the validation targets differ: another text, vocabulary or split; losses do not compare")
    means = {c: [statistics.mean(run[c] for run in runs) for runs in (before, now)] for c in CLOCKS}
    return {f"ratio_{clock}": round(after / first, 3) for clock, (first, after) in means.items()}


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        print(json.dumps(train(*json.loads(sys.argv[2]))))
        return
    import torch

    from benchmarks.docs_table import write_pages
    from moe_lab.config import ROOT
    from moe_lab.failures.results import provenance, write_json

    against = os.environ.get("AGAINST") or FIRST
    of = os.environ.get("OF", "").split() or ["now"]
    kept = [what.strip() for what in os.environ.get("KEPT", "").split(";") if what.strip()]
    if kept and len(kept) != len(of):
        print(
            f"error: KEPT: {len(kept)} texts for {len(of)} codes ({' '.join(of)}); one each, parted by ;",
            file=sys.stderr,
        )
        sys.exit(2)
    results = compare(ROOT, against, sys.argv[1:], of)
    for name, result in zip(of, results, strict=True):
        wall, cpu = (result[f"ratio_{clock}"] for clock in CLOCKS)
        print(f"{name}: training time to the target: {wall:.3f} × that of {against} (CPU time: {cpu:.3f} ×)")
    if kept:
        path = ROOT / "benchmarks" / "records.json"
        made = provenance() | {"threads": torch.get_num_threads()}
        commits = [made["commit"] if name == "now" else name for name in of]
        added = [{"what": w, **made, "commit": c, **r} for w, c, r in zip(kept, commits, results, strict=True)]
        write_json(path, [*json.loads(path.read_text()), *added])
        write_pages()


if __name__ == "__main__":
    main()
