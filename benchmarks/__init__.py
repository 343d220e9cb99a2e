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
detection_rows.py  the trainings that it watches
studies.py         the committed tables of runs anew: `make studies`
true_width/        what bf16 weights keep of their updates at the case's width
outputs.py         the notebooks' committed outputs: `make outputs`
docs_table.py      tables in the README and docs/: `make docs-table`
"""
