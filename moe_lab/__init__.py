"""A training post-mortem that you can run. The folders are the architecture; imports run downwards.

config.py    what a run is: every field of its YAML file
sections.py  how such fields are read, checked and written
data/        from text to batches
model/       the language model: one mechanism a file
optim/       who updates which tensor, how far, in which precision
train/       updates, checkpoints, records
health/      watches any PyTorch training; a distribution of its own
show/        pictures and the live run
failures/    failures on purpose, and what they cost
course/      what the notebooks share
connect/     others' engines: Hugging Face
plan.py      what a run will take, before it takes anything
__main__.py  the command line
"""

from importlib import import_module

HOMES = {"ConfigError": "config", "load_config": "config", "build_model": "model"}
HOMES |= {"RunError": "train", "Trainer": "train", "load_run": "train"}
__all__ = ["health", *HOMES]


def __getattr__(name: str):
    """Each public name is imported when it is first asked for: `from moe_lab import health` needs torch alone."""
    if name == "health":
        return import_module("moe_lab.health")
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"moe_lab.{HOMES[name]}"), name)
