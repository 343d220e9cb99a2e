"""Watch any PyTorch training and say what is wrong. Needs torch and the standard library, nothing else."""

from moe_lab.health.findings import RULES, Finding

__all__ = ["RULES", "Finding"]
