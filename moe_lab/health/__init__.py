"""Watch any PyTorch training and say what is wrong. Needs torch and the standard library, nothing else."""

from .after.inspection import inspect_checkpoint
from .before.preflight import preflight
from .during.branch import branch_findings, branch_probe
from .during.watch import Watch
from .findings import RULES, SICKNESSES, Finding

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
