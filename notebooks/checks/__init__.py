"""What the notebooks' exercises are judged by; solutions are in ../solutions.

exercise.py      what makes a check of an exercise
explorables.py   figures with controls, and how to make one
rows.py          axes with a row for each name
pair.py          two trainings side by side
checklist.py     the lines that a notebook adds to the checklist
questions_00.py, questions_01.py, figures_00.py, figures_01.py   what these notebooks ask and draw
machine_00.py    what the machine has, and the minutes of each notebook on it
remedies.py      remedies for bf16 parameters that only these notebooks try
designs.py       the tables of runs behind 03 to 04a: settings, seeds, updates
measure_01.py    collisions of tokens; two runs that look alike
explore_01.py    what a first and a last loss mean; where a loss starts, with sliders
exercises_00.py   a config to be looked at, a head to be taken away, the next token's loss of a record
exercises_01.py   losses at step 0, four batches and four runs to diagnose
exercises_02.py   a config to edit, Mixture-of-Depths, four suspected leaks
exercises_03.py   the limit of a weight, four trainings to diagnose, a sick config
exercises_03a.py  when a cosine freezes, three checkpoints, a schedule
exercises_04.py   conventions of Muon: a formula, three mysteries, a config
exercises_04a.py  four patients to diagnose, a sick config, shares of two fixes
exercises_05.py   floors passed, tokens counted, a verdict
exercises_07.py   verdicts from numbers handed in, a damaged record, norms that move in bf16
exercises_10.py   a patient of your own, a config to mend
sources_06.py     the healthy and the sick source of a bug, as one
figures_10.py     training curves, and pictures of measurements
ward.py           the runs of notebook 10: what is ordered, written down and what it is worth
ward_plans.py     what a run may have, how it is planted, and what a seed draws
ward_desk.py      the same as buttons
ward_notes.py     what a person ordered and wrote down, kept between two kernels
ward_readers.py   readers by script: the checklist's, and the curve's

study_04.py, evidence_04a.py, surface.py   what 04 and 04a read out of committed runs; their statistics
figures_04.py, figures_04a.py   what these notebooks draw; two explorables

questions_NN.py   what a notebook asks, and which answer the measured values give
verdicts_NN.py    what a notebook's numbers make of the report's claims
ledger.py         the rows of notebook 07, from what the others recorded
"""
