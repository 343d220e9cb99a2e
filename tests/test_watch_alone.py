"""The watch, lifted out of the package under another name, where nothing but torch can be imported."""

import shutil
import subprocess
import sys
from pathlib import Path

HEALTH = Path(__file__).parents[1] / "moe_lab" / "health"

SCRIPT = """
import importlib.abc, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

# what pip installs with torch; numpy it does without
TORCH = {"torch", "torchgen", "functorch", "filelock", "typing_extensions", "setuptools", "_distutils_hack", "sympy",
         "mpmath", "networkx", "jinja2", "markupsafe", "fsspec", "lifted"}

class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in TORCH | set(sys.stdlib_module_names) or top.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path = [finder for finder in sys.meta_path if finder in (BuiltinImporter, FrozenImporter)] + [Only()]
import torch
from torch import nn
import torch.nn.functional as F

for name in ("numpy", "yaml", "moe_lab", "tqdm"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")

from lifted import Watch

torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.RMSNorm(16), nn.Linear(16, 64, bias=False))
    nn.init.normal_(model[2].weight, std=0.02)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if dtype == torch.float32 else 1e-3)
    with Watch(model, optimizer, log=f"{dtype}.jsonl") as watch:
        for _ in range(60):
            ids = torch.randint(64, (8, 16))
            loss = F.cross_entropy(model(ids).float().flatten(0, 1), ((7 * ids + 3) % 64).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watch.observe(loss=loss)
    watch.report()
    print(dtype, *[f"{f.severity}:{f.rule}" for f in watch.findings if f.severity != "info"])
"""


def test_it_needs_torch_alone(tmp_path: Path) -> None:
    shutil.copytree(HEALTH, tmp_path / "lifted", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "script.py").write_text(SCRIPT)
    # -I: no PYTHONPATH, no user packages, and the folder must be named
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); exec(open('script.py').read())"
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert "torch.float32" in lines  # nothing to say
    (bf16,) = [line for line in lines if line.startswith("torch.bfloat16")]
    assert bf16.split()[1].endswith(":lost_updates")
    assert (tmp_path / "torch.bfloat16.jsonl").read_text().count("lost_updates") >= 1
