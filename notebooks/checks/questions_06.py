"""Questions of notebook 06. Exactly one option is true of what is measured."""

from __future__ import annotations

from moe_lab.course.lessons import Question

first_look = Question(
    "You have this curve, and a minute for one look at the run. Which of the three hypotheses will that look confirm?",
    {
        "the learning rate is too low": lambda m: m["collisions"] >= 3 and m["fell"],
        "the tokens are no text": lambda m: m["collisions"] < 3,
        "Mixture-of-Depths is broken": lambda m: m["collisions"] >= 3 and not m["fell"],
    },
    tempts="A loss that hardly moves looks like steps that are too short, and a router with bugs looks like a reason. Both may "
    "be true, and here one of them is. But neither can show before there is something to learn.",
)
no_fix = Question(
    "Random tokens stay in place and you make both of the report's fixes. How far below ln V does the loss on real text get?",
    {
        "not at all, within a twentieth of a nat": lambda m: m["below"] < 0.05,
        "by a few tenths of a nat": lambda m: 0.05 <= m["below"] < 1,
        "as far as without them: a model learns in any case": lambda m: m["below"] >= 1,
    },
    tempts="The training loss does fall, from a little above ln V to ln V, and it falls faster with a better learning rate. "
    "That fall is a model which stops having opinions.",
    scale=True,
)
leak_or_mode = Question(
    "The data are text now. Validation lies further above training than in the control. Which of these will the two looks show?",
    {
        "a token that sees its future": lambda m: m["heard"] and m["same_calls"],
        "two networks, one for each mode": lambda m: not m["heard"] and not m["same_calls"],
        "both": lambda m: m["heard"] and not m["same_calls"],
        "neither: the text was read too often": lambda m: not m["heard"] and m["same_calls"],
    },
    tempts="One symptom, one cause: it is how we would like it to be. Bugs of one module keep each other company, since the one "
    "test that would have found the first would have found the others.",
)
skipped = Question(
    "A layer has two sublayers. How large does a token leave it that both of them skip?",
    {
        "as it came": lambda m: m["ratio"] < 1.5,
        "twice as large": lambda m: 1.5 <= m["ratio"] < 3,
        "four times as large": lambda m: m["ratio"] >= 3,
    },
    tempts="To skip means to leave alone, and the config says `capacity`, not `gain`. But a copy of the residual was added to the "
    "residual, once in each sublayer.",
    scale=True,
)
log = Question(
    "Four micro-batches an update, a log every ten steps, 754 steps. What has this loop written down by the end?",
    {
        "75 lines": lambda m: m["logs"] == 75,
        "18 lines: one in ten updates": lambda m: m["logs"] == 18,
        "9 lines": lambda m: m["logs"] == 9,
        "nothing": lambda m: m["logs"] == 0,
    },
    tempts="754 over ten is 75, and each of both conditions is often true. They are never true at once: the one wants an odd "
    "number, and the other an even one.",
    scale=True,
)
dearest = Question(
    "Text in place, one bug at a time, a small model, 150 updates. Which of these costs most?",
    {
        "rows that are not in order of time (B04)": lambda m: max(m, key=m.get) == "B04",
        "a learning rate for another optimizer (B02)": lambda m: max(m, key=m.get) == "B02",
        "documents one after another, unshuffled (B21)": lambda m: max(m, key=m.get) == "B21",
        "parameters in bf16 (B01)": lambda m: max(m, key=m.get) == "B01",
    },
    tempts="The report named two of these four, and names stick. A cost is measured against a healthy run, and depends on the "
    "size and length of that run.",
)
credit = Question(
    "The commit is made: precision, learning rate, shape and mixtures change at once. The report credits the first two with "
    "its whole gain. How much of it do these two make by themselves?",
    {
        "less than half": lambda m: m["share"] < 0.5,
        "a half to nine tenths": lambda m: 0.5 <= m["share"] < 0.9,
        "all of it, within a tenth": lambda m: 0.9 <= m["share"] <= 1.1,
        "more than all: the others cost something": lambda m: m["share"] > 1.1,
    },
    tempts="What one meant to repair gets the credit. Who changes four things has one number, and it belongs to all four.",
    scale=True,
)
first_switch = Question(
    "It still fails after both fixes. The report says: switch Mixture-of-Depths and Mamba off first. In a run of that day, on "
    "text, what gains most?",
    {
        "MoD and Mamba off": lambda m: max(m, key=m.get) == "both off",
        "a learning rate that fits": lambda m: max(m, key=m.get) == "a fitting rate",
        "documents shuffled": lambda m: max(m, key=m.get) == "B21 mended",
    },
    tempts="The newest part is the first suspect, and this one is guilty of five bugs. Guilty is not the same as expensive.",
)
