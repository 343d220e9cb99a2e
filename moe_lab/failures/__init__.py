"""Failures on purpose, and what they cost.

bugs.py         B01, B02 and three common bugs, each a patch from outside
designs.py      the tables of runs behind the notebooks: settings, seeds, updates
experiments.py  the run engine: a cell is trained, measured by its probe, and its row kept by content
results.py      rows with their spread over seeds, their provenance, and readers of committed results
"""
