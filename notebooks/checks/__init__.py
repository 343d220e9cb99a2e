"""What the notebooks' exercises are judged by; solutions are in ../solutions.

checklist.py     the lines that a notebook adds to the checklist
measure_01.py    collisions of tokens; two runs that look alike
explore_01.py    what a first and a last loss mean; where a loss starts, with sliders
exercises_00.py   minutes of a run, the next token's loss of a record
exercises_01.py   losses at step 0, bits and nats, four runs to diagnose
exercises_02.py   caches, Mixture-of-Depths, leaks
exercises_03.py   the limit of a weight, four trainings to diagnose, a sick config
exercises_03a.py  when a cosine freezes, three checkpoints, a schedule
exercises_04.py   conventions of Muon, sums of learning rates, shares of two fixes
exercises_05.py   floors passed, tokens counted, a verdict
exercises_07.py   verdicts from numbers handed in, a damaged record, norms that move in bf16

questions_NN.py   what a notebook asks, and which answer the measured values give
verdicts_NN.py    what a notebook's numbers make of the report's claims
ledger.py         the rows of notebook 07, from what the others recorded
"""
