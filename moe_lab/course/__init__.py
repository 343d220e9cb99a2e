"""What the notebooks share.

notebook.py   how a notebook begins: its parameters, its config, where it comes from; claims
lessons.py    questions before results
case.py       the case: claims, bugs, observed runs and figures, from case.yaml; and the verdicts about its claims
runner.py     notebooks executed without a person: one, or the whole sequence
"""
