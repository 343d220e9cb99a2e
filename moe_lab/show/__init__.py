"""Pictures for readers, from the rows of a record or from plain numbers; a text description comes with each.

style.py        one style for every figure, and the way from a figure to a cell's output
plots.py        the figure of a run, and losses on one scale
live.py         LiveRun: a training in a thread, its figure and its controls
sweeps.py       losses over learning rates, and surfaces over two of them
updates.py      which share of the updates arrived, and what the loss of the rest costs
explorables.py  figures with sliders: the number line of bf16
"""
