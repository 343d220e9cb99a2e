"""Failures on purpose, and what they cost.

bugs.py         the case's bugs, each planted from outside: those of bugs.yaml, B01, B02, and three common ones
edits.py        a bug as an edit of a healthy function, for as long as a block runs
experiments.py  the run engine: a cell is trained, measured by its probe, and its row kept by content
results.py      rows with their spread over seeds, their provenance, and readers of committed results
"""
