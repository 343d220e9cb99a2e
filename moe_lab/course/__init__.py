"""What the notebooks share.

notebook.py   how a notebook begins: its parameters, its config, where it comes from; claims
lessons.py    predictions before results, and what a check of an exercise says
case.py       the case: claims, bugs, observed runs and figures, from case.yaml
verdicts.py   what was found about each claim of the report, in notebooks/results/verdicts.json
machine.py    what is installed here, how fast it trains, and what each notebook costs
runner.py     notebooks executed without a person: one, or the whole sequence
"""
