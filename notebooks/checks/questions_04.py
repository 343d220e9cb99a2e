"""Questions of notebook 04. Exactly one option is true of what is measured."""

from __future__ import annotations

from moe_lab.course.lessons import Question

step = Question(
    "The matrix is 1536 × 1536. How far does Muon at 3e-4, in the convention `original`, move an element, beside AdamW at 3e-4?",
    {
        "further than AdamW": lambda m: m["adamw_over_muon"] < 0.5,
        "about as far": lambda m: 0.5 <= m["adamw_over_muon"] < 2,
        "two to four times less far": lambda m: 2 <= m["adamw_over_muon"] < 4,
        "more than four times less far": lambda m: m["adamw_over_muon"] >= 4,
    },
    tempts="The same number looks like the same step. Muon's step is a matrix whose singular values are all about 1, and a "
    "large matrix of that kind has small elements: 1 / √1536 each.",
    scale=True,
)
adamw = Question(
    "After the warm-up, what is the RMS of AdamW's step on a matrix, divided by its learning rate?",
    {
        "about 1: it divides the gradient by the gradient's own size": lambda m: m["rms"] >= 0.75,
        "between 0.5 and 0.75": lambda m: 0.5 <= m["rms"] < 0.75,
        "between 0.1 and 0.5": lambda m: 0.1 <= m["rms"] < 0.5,
        "below 0.1": lambda m: m["rms"] < 0.1,
    },
    tempts="AdamW does divide by the gradient's size, but by that of single gradients. The mean of noisy gradients, which "
    "stands above the line, is smaller than they are.",
    scale=True,
)
sweep = Question(
    "The report says that Muon is designed for 1e-3 to 3e-3 (C10). Where is the best LR in `original`, at width 96?",
    {
        "below 1e-3": lambda m: m["lr"] < 1e-3,
        "1e-3 to 3e-3": lambda m: 1e-3 <= m["lr"] < 3e-3,
        "3e-3 to 1e-2": lambda m: 3e-3 <= m["lr"] < 1e-2,
        "above 1e-2": lambda m: m["lr"] >= 1e-2,
    },
    tempts="A published range tempts because it names no convention, no width and no length of run: so it seems to hold for all.",
    scale=True,
)
horizon = Question(
    "The run becomes four times as long, 800 updates in place of 200, with three seeds a point and a cosine. What will AdamW's "
    "best learning rate do?",
    {
        "fall to half or less, as the surfaces say": lambda m: m["ratio"] <= 0.5,
        "show no fall by half": lambda m: 0.5 < m["ratio"] < 2,
        "rise to twice or more": lambda m: m["ratio"] >= 2,
    },
    tempts="A fitted line with intervals looks like a finding. These intervals come from the residuals of a quadratic, with one "
    "seed a point and a constant learning rate.",
    scale=True,
)
