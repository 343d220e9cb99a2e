"""Remedies for bf16 parameters (placeholder, being written)."""
REMEDIES: dict = {}
