"""What the notebooks share.

notebook.py   how a notebook begins: its parameters, its config, where it comes from; claims
lessons.py    questions before results, and what a check of an exercise says
case.py       the case: claims, bugs, observed runs and figures, from case.yaml; and the verdicts about its claims
machine.py    how fast this machine trains, and what each notebook costs
runner.py     notebooks executed without a person: one, or the whole sequence
copies.py     working copies for a reader, in work/, and their solutions
"""
