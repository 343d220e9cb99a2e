"""What a config's comments say beside its values."""

import re
from pathlib import Path

import pytest

from moe_lab.health.before.comments import Statement, statements
from moe_lab.health.before.preflight import preflight

SILENT = ["Muon takes 3–10 × the LR of AdamW", "10x higher than for AdamW", "not for AdamW", "don't use 0.02 for Muon"]
SILENT += ["too high for AdamW", "Muon's; AdamW has its own", "Muon at step 100", "of Muon, in the convention below"]
SILENT += ["million tokens"]


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        *((comment, []) for comment in SILENT),
        ("Lower for AdamW (use 0.001 for Muon)", [Statement("muon", 1e-3, 1e-3)]),
        ("AdamW: 3e-4, Muon: 0.02", [Statement("adam", 3e-4, 3e-4), Statement("muon", 0.02, 0.02)]),
        ("3e-4 with AdamW; 0.02 with Muon", [Statement("adam", 3e-4, 3e-4), Statement("muon", 0.02, 0.02)]),
        ("for Muon use 0.02", [Statement("muon", 0.02, 0.02)]),
        ("Muon wants 0.001 to 0.003", [Statement("muon", 1e-3, 3e-3)]),
        ("1e-3 – 3e-3 for Muon", [Statement("muon", 1e-3, 3e-3)]),
    ],
)
def test_statements(comment: str, expected: list) -> None:
    assert [s for s in statements(comment) if s.family] == expected


COMMENTS = [
    ("  max_lr: 0.0003  # Lower for AdamW (use 0.001 for Muon)", "muon", "lr_too_low"),
    ("  max_lr: 0.0003  # Lower for AdamW (use 0.001 for Muon)", "adamw", None),
    ("  max_lr: 0.001  # Lower for AdamW (use 0.001 for Muon)", "muon", None),
    ("  max_lr: 0.001  # Lower for AdamW (use 0.001 for Muon)", "adamw", None),
    ("  # use 1e-3 for Muon\n  max_lr: 3e-4", "muon", "lr_too_low"),
    ("  max_lr: 0.02  # AdamW: 3e-4, Muon: 0.02", "adamw", "lr_too_high"),
    ("  max_lr: 0.02  # AdamW: 3e-4, Muon: 0.02", "muon", None),
    ("  max_lr: 0.002  # Muon: 0.001 to 0.003", "muon", None),
    ("  max_lr: 0.0003  # for AdamW", "muon", None),
    ("  max_lr: 0.0003  # for AdamW", "adamw", None),
    ("  max_lr: 0.02  # for Muon", "adamw", None),
    ("  max_lr: 0.01  # for SGD: 0.1", "sgd", "lr_too_low"),
    ("  max_lr: 0.02  # not for AdamW", "muon", None),
    ("  max_lr: 0.02  # of Muon; 3e-4 for AdamW", "muon", None),
    ("  adamw_lr: 0.0003  # for AdamW beside it", "muon", None),
    ("  max_lr: 0.02\n  warmup_steps: 3  # for AdamW", "muon", None),
    ("  max_lr: 0.02  # the usual\n  # use 0.001 for Muon", "muon", None),  # belongs to what follows
    ("  max_lr: 0.0003  # for AdamW", "unheard_of", None),
    ('  max_lr: "0.0003 # for AdamW"', "muon", None),  # no comment
]


@pytest.mark.parametrize(("line", "optimizer", "expected"), COMMENTS)
def test_a_comment_beside_or_above_a_learning_rate(tmp_path: Path, line: str, optimizer: str, expected) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"training:\n{line}\noptimizer:\n  type: {optimizer}\n", encoding="utf-8")
    found = [f for f in preflight(path) if f.severity != "info"]
    assert [f.rule for f in found] == ([expected] if expected else [])
    for finding in found:
        place, _, number = finding.where.rpartition(":")
        assert place == str(path) and "max_lr" in path.read_text().splitlines()[int(number) - 1]
        assert re.search(r"# .*(Muon|AdamW|SGD)", finding.message)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("mod_enabled: true  # Disabled", True),
        ("mod_enabled: false  # enabled now", True),
        ("mod_enabled: false  # Disabled", False),
        ("mod_enabled: true  # off by default upstream", False),
        ("mod_enabled: true  # disabled in evaluation", False),
        ("mod_enabled: true  # costs little", False),
        ("n_layers: 3  # off", False),
    ],
)
def test_a_switch_whose_comment_says_the_opposite(line: str, says: bool, tmp_path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"model:\n  # off\n  {line}\n")
    assert [f.rule for f in preflight(path)] == (["comment_contradicts"] if says else [])
