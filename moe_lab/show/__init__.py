"""Pictures for readers, from the rows of a record or from plain numbers; a text description comes with each.

style.py        one style for every figure, and the way from a figure to a cell's output
plots.py        the figure of a run; losses on one scale
live.py         LiveRun: a training in a thread, its figure and its controls
sweeps.py       figures of tables of runs: learning rates, surfaces over two of them
explorables.py  figures with controls, and how to make one; the number line of bf16
"""
