"""Before a second of compute: what a config and its comments say.

preflight.py   preflight(source): reads a YAML file or a mapping, and the rules
plan.py        what the keys mean, by the names of many projects: sizes, optimizers, LRs, schedule
comments.py    comments that contradict the learning rate they stand beside
"""
