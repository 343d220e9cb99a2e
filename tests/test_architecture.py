import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_lab"

# DESIGN's table: what a room may import beside itself. A path with a dot opens one file of a room.
TRAINING = {"config", "data", "model", "optim"}
ALLOWED = {
    "sections": set(),
    "config": {"sections"},
    "data": {"config"},
    "model": {"config"},
    "optim": {"config"},
    # how elements are sampled for a checkpoint is how the watch and the inspection sample them: one way, and health's
    "train": {*TRAINING, "health.sampling"},
    "health": set(),
    "show": {"config", "train.record", "health"},
    "failures": {*TRAINING, "train", "health"},
    "course": {"sections", *TRAINING, "train", "health", "show", "failures"},
    "plan": {"config", "model", "optim"},
    "connect": {*TRAINING, "train", "health"},
}
DOORS = {"__init__", "__main__"}  # what a user enters by; these may import anything
HEALTH_PACKAGES = {"torch", *sys.stdlib_module_names}  # so that health can be lifted into another project
# who reads YAML files or serves another's Trainer imports that package inside of a function
INSIDE = {"preflight.py": "yaml", "callback.py": "transformers"}


def imported(path: Path, source: str) -> list[tuple[str, ast.AST]]:
    """Full dotted name of everything that the file at `path` imports, in whichever of Python's forms."""
    package = path.relative_to(ROOT).parent.parts  # ("moe_lab", "train")
    names: list[tuple[str, ast.AST]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names += [(".".join((*base, *filter(None, [node.module]), alias.name)), node) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names += [(str(argument.value), node) for argument in node.args if isinstance(argument, ast.Constant)]
    return names


def violations(path: Path, source: str) -> list[str]:
    """What the file imports against the table."""
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in DOORS:
        return []
    allowed = [f"moe_lab.{name}" for name in ALLOWED[room] | {room}]
    bad = []
    for name, node in imported(path, source):
        top = name.split(".")[0]
        if top == "moe_lab" and not any(name == prefix or name.startswith(prefix + ".") for prefix in allowed):
            bad.append(name)
        inside = INSIDE.get(path.name) == top and node.col_offset  # an indented line
        if room == "health" and top not in {"moe_lab", *HEALTH_PACKAGES} and not inside:
            bad.append(name)
    return bad


def test_every_room_is_in_the_table() -> None:
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - DOORS - {"__pycache__"} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("model/x.py", "import moe_lab.train"),
        ("model/x.py", "from moe_lab import train"),
        ("model/x.py", "from moe_lab.train.loop import Trainer"),
        ("model/x.py", "from ..train import loop"),
        ("model/x.py", "from .. import train"),
        ("model/deep/x.py", "from ...train import loop"),
        ("model/__init__.py", "from ..optim import Muon"),
        ("model/x.py", "from moe_lab import Trainer"),  # through the front door
        ("model/x.py", "import moe_lab"),
        ("model/x.py", "def f():\n    from moe_lab import train"),
        ("model/x.py", "importlib.import_module('moe_lab.train')"),
        ("config.py", "from moe_lab.model import build_model"),
        ("sections.py", "from moe_lab.config import Config"),
        ("data/x.py", "from moe_lab.sections import build"),
        ("optim/x.py", "from moe_lab.model import build_model"),
        ("train/x.py", "from moe_lab import health"),
        ("train/x.py", "from moe_lab.health.during.watch import Watch"),
        ("show/x.py", "from moe_lab.train.loop import Trainer"),
        ("show/x.py", "from ..train.recorder import read"),
        ("course/x.py", "from moe_lab.connect import hf"),
        ("failures/x.py", "from moe_lab.show import style"),
        ("connect/x.py", "from moe_lab.failures import bugs"),
        ("health/x.py", "from moe_lab.config import Config"),
        ("health/x.py", "import numpy as np"),
        ("health/before/preflight.py", "import yaml"),
        ("health/during/callback.py", "from transformers import TrainerCallback"),
        ("health/during/callback.py", "def f():\n    import yaml"),
        ("health/x.py", "def f():\n    import yaml"),
    ],
)
def test_a_forbidden_import_is_seen(place: str, line: str) -> None:
    assert len(violations(PACKAGE / place, f"import json\n{line}\n")) == 1


def test_what_the_table_allows_is_allowed() -> None:
    show = "from . import style\nfrom moe_lab.train.record import read_record\nfrom ..train import record\nfrom ..health import Watch\n"
    assert violations(PACKAGE / "show" / "x.py", show) == []
    preflight = "import torch.nn\nimport json\nfrom ..rules import Rule\ndef f():\n    import yaml\n"
    assert violations(PACKAGE / "health" / "before" / "preflight.py", preflight) == []
    assert violations(PACKAGE / "__main__.py", "from moe_lab.course import runner\n") == []


def shrugs(source: str) -> list[int]:
    """Lines of handlers that do nothing about what they caught."""
    handlers = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler)]

    def idle(node: ast.AST) -> bool:
        return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))

    return [node.lineno for node in handlers if node.type is None or all(idle(inner) for inner in node.body)]


def too_long(source: str) -> list[str]:
    """What is over 320 lines in a file, or over 50 in a function."""
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = [node.name for node in functions if node.end_lineno - node.lineno >= 50]
    return found + ["the file"] * (len(source.splitlines()) > 320)


def test_what_is_too_long_is_seen() -> None:
    body = "def f():\n" + "    x = 1\n" * 49
    assert too_long(body) == [] and too_long(body + "    x = 1\n") == ["f"]
    assert too_long("x = 1\n" * 320) == [] and too_long("x = 1\n" * 321) == ["the file"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table_no_file_is_long_and_no_error_is_swallowed(path: Path) -> None:
    source = path.read_text()
    assert violations(path, source) == []
    assert too_long(source) == []
    assert shrugs(source) == []


@pytest.mark.parametrize("body", ["except OSError:\n    pass", "except OSError:\n    ...", "except:\n    raise"])
def test_a_swallowed_error_is_seen(body: str) -> None:
    assert shrugs(f"try:\n    f()\n{body}\n") == [3]
    assert shrugs("try:\n    f()\nexcept OSError as error:\n    print(error)\n") == []


# ---- maps -----------------------------------------------------------------------------------------------------------


FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def without_a_line(folder: Path, text: str) -> list[str]:
    """Files and folders in `folder` that no line of `text` begins with, and lines about what is not there."""
    there = {path.name for path in folder.glob("*.py")}
    there |= {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    named = re.findall(r"^(\w+(?:\.py|/))  ?\S*", text, re.MULTILINE)
    return sorted((there - {"__init__.py"}) ^ set(named)) + [name for name in set(named) if named.count(name) > 1]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_each_folder_has_a_map_that_is_complete(folder: Path) -> None:
    """The docstring of its __init__: a line a file."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert without_a_line(folder, text) == []


def test_a_hole_in_a_map_is_seen(tmp_path: Path) -> None:
    for name in ("__init__.py", "one.py", "two.py", "deep/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert without_a_line(tmp_path, "A room.\n\none.py  this\ntwo.py  that\ndeep/   more\n") == []
    assert without_a_line(tmp_path, "A room of one.py and two.py.\n\ndeep/  more") == ["one.py", "two.py"]
    assert without_a_line(tmp_path, "one.py  a\ntwo.py  b\ndeep/  c\nthree.py  d\none.py  a") == ["three.py", "one.py"]


# ---- what an import costs -------------------------------------------------------------------------------------------


def test_health_through_the_front_door_loads_torch_and_nothing_else_of_weight() -> None:
    """What torch itself loads (numpy, where it is installed) is torch's; beyond that the standard library alone."""
    code = """import sys, torch
before = {name.split(".")[0] for name in sys.modules}
from moe_lab import health
health.Watch, health.preflight, health.inspect_checkpoint, health.start_sample, health.branch_probe
print(*sorted({name.split(".")[0] for name in sys.modules} - before - sys.stdlib_module_names))
print(*sorted(name for name in sys.modules if name.startswith("moe_lab.") and not name.startswith("moe_lab.health")))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "moe_lab\n\n"


def test_the_front_door_has_what_it_promises() -> None:
    import moe_lab

    promised = {"load_config", "build_model", "load_run", "Trainer", "health", "ConfigError", "RunError"}
    assert set(moe_lab.__all__) == promised and all(getattr(moe_lab, name) for name in promised)
    with pytest.raises(AttributeError, match="module 'moe_lab' has no attribute 'trainer'"):
        moe_lab.trainer  # noqa: B018
