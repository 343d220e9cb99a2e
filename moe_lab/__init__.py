"""A training post-mortem that you can run. See README.md; the folders are the architecture."""

from moe_lab import health
from moe_lab.config import ConfigError, load_config
from moe_lab.model import build_model
from moe_lab.train import RunError, Trainer, load_run

__all__ = ["ConfigError", "RunError", "Trainer", "build_model", "health", "load_config", "load_run"]
