"""Measurements, long studies, and what is generated from them; a command each.

record.py          time to a loss, against an older commit: `make record`
bench.py           works side by side with other libraries and with the first commit: `make bench`
peers.py           what it compares
shares.py          how much of the matrix rate a step uses, part by part
growth.py          tokens a second over length, experts, width and layers
measure.py         pairs in turn, intervals, peak memory, the CPU's kind
seeds.py           the default run over three seeds: `make seeds`
watch_cost.py      what a Watch costs the default run: `make watch-cost`
detection.py       does the watch name each sickness: `make detection`
detection_rows.py  all of its rows, and in which half each stands
detection_bodies.py  the kinds of model
detection_kinds.py  the rarer ones
detection_twins.py  the loop, and what a row is
detection_loops.py  rows whose fault is in the loop
detection_schedules.py  rows whose fault is in the learning rates, or in schedules on paper
detection_models.py  rows whose fault is in the model
detection_structure.py  rows whose fault is beside the model
detection_data.py  rows whose fault is in targets and data
detection_threads.py  the second judged set, from public threads: loops, schedules, data
detection_threads_models.py  its other half: models and what is beside them
operators.py       mutation operators that we did not write: `make operators`
tools.py           other tools on the judged rows: `make tools`
programs.py        what a training is to those who watch it; data; tables of runs that are kept by content
healthy.py         does health keep quiet about trainings that are well: `make healthy`
healthy_rates.py   which learning rates those get, chosen by their losses alone
healthy_families.py  every family of transformers that runs here in tiny form
healthy_language.py  one language model under every optimizer and schedule
healthy_loops.py   precision, accumulation, averages, freezing, adapters
healthy_senses.py  pictures and sounds
healthy_kinds.py   recurrent, generative, reinforced, physical, sparse
studies.py         the committed tables of runs anew: `make studies`
true_width/        what bf16 weights keep of their updates at the case's width
copies.py          a reader's working copies of the notebooks, and their solutions: `make lab`
outputs.py         the notebooks' committed outputs: `make outputs`
docs_table.py      tables in the README and docs/: `make docs-table`
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))  # where `checks` lies
