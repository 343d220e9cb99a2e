"""Watch any PyTorch training and say what is wrong. Needs torch and the standard library, nothing else."""

from moe_lab.health.branch import branch_findings, branch_probe
from moe_lab.health.findings import RULES, SICKNESSES, Finding
from moe_lab.health.inspection import inspect_checkpoint
from moe_lab.health.preflight import preflight
from moe_lab.health.watch import Watch

__all__ = ["RULES", "SICKNESSES", "Finding", "Watch", "branch_findings", "branch_probe", "inspect_checkpoint", "preflight"]
