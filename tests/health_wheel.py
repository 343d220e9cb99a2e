"""Build the wheel of moe_lab/health and check it under the oldest and the newest torch that it claims: `make health-wheel`.

An environment for each in a temporary folder, one after the other; on Linux pip takes torch's CUDA builds, some 5 GB each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEALTH = ROOT / "moe_lab" / "health"
CHECKS = ROOT / "tests" / "wheel_checks.py"
PYPROJECT = tomllib.loads((HEALTH / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def build(folder: Path) -> Path:
    """The wheel, made from a copy in `folder`, so that nothing is left beside the sources. Needs setuptools and no network."""
    source = folder / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(HEALTH, source, ignore=leave_out)
    subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=source, check=True, capture_output=True, timeout=100)
    (wheel,) = folder.glob("*.whl")
    return wheel


def claimed() -> tuple[str, str]:
    """What pip is asked for: the oldest and the newest torch of the wheel's `torch>=A,<B`."""
    (requirement,) = PYPROJECT["project"]["dependencies"]
    oldest, newest = requirement.removeprefix("torch>=").split(",<")
    return f"torch=={oldest}.*", f"torch<{newest}"


def main() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for torch in claimed():
        with tempfile.TemporaryDirectory() as folder:
            wheel, python = build(Path(folder)), Path(folder) / "venv" / "bin" / "python"
            subprocess.run([sys.executable, "-m", "venv", Path(folder) / "venv"], check=True)
            print(f"{torch}: installing it and {wheel.name} into an empty environment", flush=True)
            pip = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
            subprocess.run([*pip, torch, wheel], check=True)
            checks = [python, "-I", "-W", "ignore", CHECKS, HEALTH / "README.md"]
            subprocess.run(checks, check=True, cwd=folder, env=environment, timeout=300)


if __name__ == "__main__":
    main()
