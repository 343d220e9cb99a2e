"""Watch any PyTorch training and say what is wrong. Needs torch and the standard library, nothing else."""

from .branch import branch_findings, branch_probe
from .findings import RULES, SICKNESSES, Finding
from .inspection import inspect_checkpoint
from .preflight import preflight
from .watch import Watch

__all__ = [
    "RULES",
    "SICKNESSES",
    "Finding",
    "Watch",
    "branch_findings",
    "branch_probe",
    "inspect_checkpoint",
    "preflight",
]
