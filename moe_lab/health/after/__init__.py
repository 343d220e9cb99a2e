"""Afterwards, from a file: what a checkpoint shows by itself.

inspection.py    inspect_checkpoint(path): what never moved, which learning rate is baked in, what does not fit
"""
