"""From text to seeded, resumable batches. What cannot be read is an error; no token is ever made up."""

from moe_lab.data.batches import Batches, validation_windows
from moe_lab.data.ngrams import loss_floors
from moe_lab.data.prepare import Dataset, prepare

__all__ = ["Batches", "Dataset", "loss_floors", "prepare", "validation_windows"]
