"""Questions of notebook 08. Exactly one option is true of what is measured."""

from __future__ import annotations

from moe_lab.course.lessons import Question

form = Question(
    "A checkpoint was saved in bfloat16. You load it and hand it to a Trainer with bf16=True. In which format are its "
    "weights while it trains?",
    {
        "float32, with bfloat16 products under autocast": lambda m: m["narrow"] == 0,
        "bfloat16, all of them": lambda m: m["narrow"] == m["tensors"],
        "bfloat16, but for the norms, which are kept in float32": lambda m: 0 < m["narrow"] < m["tensors"],
    },
    tempts="bf16=True is called mixed precision, and mixed precision means float32 weights. The flag mixes what it is given: "
    "it casts what goes into products, and of the weights it changes nothing.",
)
accumulated = Question(
    "A model's forward takes **others and ignores what is in it. Its loss is a mean. Four micro-batches make an update. "
    "How large is the gradient, beside that of a model that does not ignore it?",
    {
        "a quarter": lambda m: abs(m["ratio"] - 0.25) < 0.1,
        "the same: Trainer divides by four": lambda m: abs(m["ratio"] - 1) < 0.2,
        "four times as large": lambda m: abs(m["ratio"] - 4) < 0.5,
    },
    tempts="Trainer did divide, for years. Since the accumulation was repaired it divides only for a model that cannot take "
    "the number of targets, and **others looks as if it could.",
    scale=True,
)
hidden = Question(
    "At update 13 one loss is NaN. With logging_steps=1, what does Trainer's log show from there on?",
    {
        "NaN, from that update to the end": lambda m: m["nan"] > 0,
        "the training stops with an error": lambda m: m["updates"] < m["planned"],
        "the loss before it, again and again": lambda m: (
            m["nan"] == 0 and m["updates"] == m["planned"] and m["last"] > 1
        ),
        "0, from that update to the end": lambda m: m["nan"] == 0 and m["updates"] == m["planned"] and m["last"] == 0,
    },
    tempts="NaN spreads: whatever is added to it is NaN. But the log is not the sum. A filter stands before it, and it is on "
    "unless you switch it off.",
)
