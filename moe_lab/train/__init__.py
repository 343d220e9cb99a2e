"""Trains a model in a run directory: updates, checkpoints, a record that can be read at any moment.

loop.py        the Trainer: steps, fit
device.py      where and in which precision a run computes
readings.py    what is read off each step, on the device until it is worth a transfer
evaluate.py    the validation loss
controls.py    what a person or a signal may ask for while a run goes on
checkpoint.py  a run's state, written whole or not at all, and read back
directory.py   who may write in a run's directory, what a run begins and ends with, which config resumes, and load_run
record.py      JSON lines: record, findings; the commit
command.py     how a command trains, and how it ends
"""

from moe_lab.train.checkpoint import RunError
from moe_lab.train.directory import load_run
from moe_lab.train.loop import Trainer
from moe_lab.train.record import read_record

__all__ = ["RunError", "Trainer", "load_run", "read_record"]
