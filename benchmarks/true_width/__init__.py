"""What bf16 weights keep of their updates at width 1536: predicted from narrow models, then measured.

true_width.py  the two phases, their statistics and their command
one_block.py   the runs: one block in a one-layer language model
shadow.py      what rounding would keep of each update of a float32 run
"""
