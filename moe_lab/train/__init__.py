from moe_lab.train.checkpoint import RunError
from moe_lab.train.load import load_run
from moe_lab.train.loop import Trainer
from moe_lab.train.record import read_record

__all__ = ["RunError", "Trainer", "load_run", "read_record"]
