"""The wheel of moe_lab/health, where nothing but torch can be imported: it holds all of health and does what its README says."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import health_wheel
import pytest
from health_wheel import HEALTH, PYPROJECT, ROOT
from setuptools.discovery import PackageFinder

# what pip installs with torch; numpy it does without
ALONE = """
import importlib.abc, runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

TORCH = {"torch", "torchgen", "functorch", "filelock", "typing_extensions", "setuptools", "_distutils_hack", "sympy",
         "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "moe_lab_health"}

class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in TORCH | set(sys.stdlib_module_names) or top.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path = [finder for finder in sys.meta_path if finder in (BuiltinImporter, FrozenImporter)] + [Only()]
_, site, checks, readme = sys.argv
sys.path.insert(0, site)
sys.argv = [checks, readme]
runpy.run_path(checks, run_name="__main__")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return health_wheel.build(tmp_path_factory.mktemp("wheel"))


def test_it_holds_all_of_health_and_needs_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = file.read(next(name for name in file.namelist() if name.endswith("/METADATA"))).decode()
        licence = file.read(next(name for name in file.namelist() if name.endswith("/LICENSE"))).decode()
    ours = {path.relative_to(HEALTH) for path in HEALTH.rglob("*.py") if "build" not in path.parts}
    assert names == {f"moe_lab_health/{path.as_posix()}" for path in ours}
    torch, *others = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert sorted(torch.removeprefix("torch").split(",")) == ["<2.15", ">=2.6"]
    assert all("extra ==" in other for other in others)
    assert licence == (ROOT / "LICENSE").read_text()


def test_it_does_what_its_readme_says_where_nothing_but_torch_can_be_imported(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    # -I: no PYTHONPATH, no user packages, and the folder must be named
    command = [sys.executable, "-I", "-c", ALONE, tmp_path / "site", health_wheel.CHECKS, HEALTH / "README.md"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith(": the wheel does what it says\n")


def test_each_private_interface_is_among_the_checks() -> None:
    defined = [node.name for node in ast.parse((HEALTH / "torch_private.py").read_text()).body if hasattr(node, "name")]
    checks = health_wheel.CHECKS.read_text()
    assert len(defined) >= 6 and [name for name in defined if f"private.{name}(" not in checks] == []


def test_oldest_and_newest_torch_are_those_of_the_claim() -> None:
    assert health_wheel.claimed() == ("torch==2.6.*", "torch<2.15")


def test_what_a_build_leaves_behind_is_no_part_of_the_lab(tmp_path: Path) -> None:
    """pip builds in the folder; git ignores what stays there, and so does the lab's own wheel."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    for package in ("", "health", "health/before", "health/build/lib/moe_lab_health"):
        (tmp_path / "moe_lab" / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / "moe_lab" / package / "__init__.py").touch()
    assert options.pop("namespaces") is False
    assert set(PackageFinder.find(tmp_path, **options)) == {"moe_lab", "moe_lab.health", "moe_lab.health.before"}
    assert {"build/", "*.egg-info/"} <= set((ROOT / ".gitignore").read_text().splitlines())
    ours = {name.replace("moe_lab_health", "moe_lab.health") for name in PYPROJECT["tool"]["setuptools"]["packages"]}
    assert ours == {p for p in PackageFinder.find(ROOT, **options) if p.startswith("moe_lab.health")}
    assert ours == {"moe_lab.health", *(f"moe_lab.health.{name}" for name in ("after", "before", "during"))}
