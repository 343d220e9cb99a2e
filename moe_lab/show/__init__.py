"""Pictures for readers, from the rows of a record or from plain numbers; a text description comes with each.

style.py        one style for every figure, and the way from a figure to a cell's output
plots.py        the figure of a run
live.py         LiveRun: a training, with a figure, controls and findings
dashboard.py    what every live training has: the worker thread, the controls, the output
front.py        what a front end needs to be told while a cell waits
"""
