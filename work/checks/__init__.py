"""What the notebooks' exercises are judged by; solutions are in ../solutions.

exercises_00.py   minutes of a run, the next token's loss of a record
exercises_01.py   losses at step 0, bits and nats, four runs to diagnose
exercises_02.py   caches, Mixture-of-Depths, leaks
exercises_03.py   gaps of bf16, four tensors to diagnose
exercises_04.py   conventions of Muon, sums of learning rates, shares of two fixes
exercises_05.py   floors passed, tokens counted, a verdict
"""
