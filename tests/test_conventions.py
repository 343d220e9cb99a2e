"""What a learning rate means, against torch's own Muon, a random search, and the table of GPT-3."""

import itertools
import math

import pytest
import torch

from moe_lab.health import conventions as c
from moe_lab.health.conventions import Group, judge

SHAPES = [(64, 64), (64, 256), (256, 64), (3, 32, 96)]


@pytest.mark.parametrize("convention", c.CONVENTIONS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_step_is_that_of_torchs_muon(shape: tuple, convention: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([p], lr=0.01, weight_decay=0.0, adjust_lr_fn=convention)
    p.grad = torch.randn(shape, generator=generator)
    optimizer.step()
    moved = p.detach().square().mean().sqrt().item()
    # five Newton–Schulz steps leave singular values between 0.7 and 1.2
    assert 0.75 < moved / c.muon_element_step(0.01, shape, convention) < 1.15


@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_conventions_are_inverses(shape: tuple) -> None:
    lr = c.lr_original_from_match(1e-3, shape)
    assert lr == pytest.approx(0.2 * math.sqrt(shape[-1]) * 1e-3)
    steps = [c.muon_element_step(lr, shape, "original"), c.muon_element_step(1e-3, shape, "match_rms_adamw")]
    assert steps == pytest.approx([0.2e-3, 0.2e-3])
    assert c.adamw_equivalent(lr, shape, "original") == pytest.approx(1e-3)
    assert c.adamw_equivalent(1e-3, shape, "match_rms_adamw") == pytest.approx(1e-3)


def test_an_unknown_convention() -> None:
    with pytest.raises(ValueError, match=r"^convention='keller' is not one of original, match_rms_adamw$"):
        c.muon_element_step(1e-3, (4, 4), "keller")


def test_the_usual_lr_is_a_least_squares_line_through_the_table() -> None:
    x = torch.tensor([[1.0, math.log(n)] for n, _ in c.GPT3], dtype=torch.float64)
    y = torch.tensor([[math.log(lr)] for _, lr in c.GPT3], dtype=torch.float64)
    start, slope = torch.linalg.lstsq(x, y).solution.flatten().tolist()
    assert -0.33 < slope < -0.28
    for n in (1e6, 1e8, 1.5e9, 1e12):
        assert c.usual_adamw_lr(n) == pytest.approx(math.exp(start + slope * math.log(n)))
    assert all(0.7 < c.usual_adamw_lr(n) / lr < 1.4 for n, lr in c.GPT3)
    assert c.usual_adamw_lr(1e3) == c.usual_adamw_lr(1e6)
    with pytest.raises(ValueError, match=r"^n_parameters=0 must be more than 0$"):
        c.usual_adamw_lr(0)


WIDE = (1536, 1536)
CASE = [Group("muon", "muon", 3e-4, WIDE), Group("adamw", "adam", 9e-5)]


@pytest.mark.parametrize(
    ("groups", "n_parameters", "expected"),
    [
        (CASE, 1.5e9, ["muon_convention"]),
        ([Group("muon", "muon", 3e-4, WIDE, "match_rms_adamw"), CASE[1]], 1.5e9, []),
        ([Group("muon", "muon", 1e-3, WIDE), Group("adamw", "adam", 3e-4)], 1.5e9, []),
        ([Group("muon", "muon", 0.02, WIDE, "match_rms_adamw"), Group("adamw", "adam", 3e-4)], 1.5e9, ["muon_convention"]),
        ([Group("muon", "muon", 3e-6, WIDE), Group("adamw", "adam", 9e-7)], 1.5e9, ["lr_too_low"]),
        ([Group("muon", "muon", 3e-6, WIDE), Group("adamw", "adam", 2e-4)], 1.5e9, ["lr_too_low"]),
        ([Group("muon", "muon", 1.0, WIDE), Group("adamw", "adam", 0.1)], 1.5e9, ["lr_too_high"]),
        ([Group("muon", "muon", 0.02, (768, 768)), Group("adamw", "adam", 3e-4)], 1.2e8, []),  # published practice
        ([Group("muon", "muon", 0.05, (768, 768)), Group("adamw", "adam", 3e-4)], 1.2e8, []),
        ([Group("all", "adam", 6e-4)], 1.24e8, []),  # GPT-2 small as it is usually reproduced
        ([Group("all", "adam", 1e-5)], 1.24e8, ["lr_too_low"]),
        ([Group("all", "adam", 3e-2)], 1.24e8, ["lr_too_high"]),
        ([Group("a", "adam", 0.0)], 1e8, []),
        ([], 1e8, []),
    ],
)  # fmt: skip
def test_judge(groups: list, n_parameters: float, expected: list) -> None:
    findings = judge(groups, n_parameters)
    assert [f.rule for f in findings] == expected and all(f.severity == "warning" for f in findings)


def test_a_convention_finding_names_a_number_that_is_in_range() -> None:
    finding = judge(CASE, 1.5e9)[0]
    assert finding.where == "muon" and finding.value == pytest.approx(0.182, abs=0.001)
    assert "match_rms_adamw" in finding.advice
    number = float(finding.advice.rsplit(" ", 1)[-1])
    assert judge([Group("muon", "muon", number, WIDE), CASE[1]], 1.5e9) == []


@pytest.mark.parametrize(
    ("lr", "width", "convention", "read"),
    [
        (1e-4, 400, "original", "match_rms_adamw"),  # as AdamW 2.5e-5; as match_rms_adamw 1e-4, nearer
        (0.1, 64, "match_rms_adamw", "original"),  # as AdamW 0.1; as original 0.06
        (1e-4, 400, "match_rms_adamw", None),  # as original farther still
        (1.0, 400, "original", None),
    ],
)
def test_a_number_out_of_range_in_both_conventions_is_told_in_the_nearer_one_too(lr, width, convention, read) -> None:
    (finding,) = judge([Group("muon", "muon", lr, (width, width), convention), Group("a", "adam", 3e-3)], 1e6)
    assert finding.rule.startswith("lr_too") and ("Read as" in finding.message) == (read is not None)
    ratio = c.adamw_equivalent(lr, (width, width), read or convention) / c.usual_adamw_lr(1e6)
    assert not read or finding.message.endswith(f"Read as {read}, Muon's would be {ratio:.2g} × the usual")


def test_in_narrow_matrices_the_convention_is_not_blamed() -> None:
    for lr, convention in itertools.product((1e-5, 0.1), c.CONVENTIONS):
        found = judge([Group("muon", "muon", lr, (16, 16), convention), Group("a", "adam", 1e-3)], 1e6)
        assert [f.rule for f in found] == ["lr_too_low" if lr < 1e-3 else "lr_too_high"]
