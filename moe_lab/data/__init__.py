"""From text to seeded, resumable batches. What cannot be read is an error; no token is ever made up.

corpus.py   a source's documents, from files or from Hugging Face, and their split
tokens.py   a byte-level BPE, and texts as its tokens
stream.py   the same of a data set that need not fit in memory
prepare.py  documents to tokens on disk, kept by content
batches.py  windows for training and for validation
ngrams.py   loss floors: what tables of counts reach
"""

from moe_lab.data.batches import Batches, validation_windows
from moe_lab.data.ngrams import loss_floors
from moe_lab.data.prepare import Dataset, prepare

__all__ = ["Batches", "Dataset", "loss_floors", "prepare", "validation_windows"]
