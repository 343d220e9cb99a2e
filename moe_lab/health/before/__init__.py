"""Before the first update: what a config and its comments, batches, and a model say.

preflight.py   preflight(source): reads a YAML file or a mapping, and the rules
plan.py        what the keys mean, by the names of many projects: sizes, optimizers, LRs, schedule
schedule.py    warm-up, decay and intervals against the budget
comments.py    comments that contradict the learning rate they stand beside
data.py        check_data(batches): random, repeated, masked or misplaced tokens
examples.py    the same of numbers with targets: pictures, tables, series
flow.py        check_train_eval: who computes in which mode, and what comes of it
listening.py   what one pass shows: scaled copies, memories that end early, positions that are ranks
structure.py   ties, copies, what nobody holds, stale tensors, 16-bit weights that cannot move, arguments without effect
trying.py      unread_keys, dry_run: what one's own code does when it is run
backward.py    backward passes beside the loss's own: of a multiple of it, of the answer alone
operations.py  what single operations show: terms of the loss without a gradient, rows that others overwrite
trial.py       the copy that is examined, and the forward passes that may be spent on it
examine.py     examine(model, batch, …): all of it in one call, and what could not be looked at
"""
