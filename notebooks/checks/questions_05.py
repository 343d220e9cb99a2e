"""Questions of notebook 05. Exactly one option is true of what is measured."""

from __future__ import annotations

from moe_lab.course.lessons import Question

loss = Question(
    "Where does the validation loss of this run end?",
    {
        "between ln V and the unigram table": lambda m: m["passed"] == 0,
        "between the unigram and the bigram table": lambda m: m["passed"] == 1,
        "between the bigram and the trigram table": lambda m: m["passed"] == 2,
        "below the trigram table": lambda m: m["passed"] == 3,
    },
    tempts="A few minutes seem too short to beat a table that has counted the whole training text, so the options in the middle "
    "tempt. The table forgets everything but two tokens; the model does not.",
    scale=True,
)
twin = Question(
    "The same run with bf16 parameters: how far from 1 is the furthest norm weight after the first updates?",
    {
        "as far as in float32": lambda m: m["bf16"] >= 0.9 * m["float32"],
        "less far than in float32, and it has moved": lambda m: 0 < m["bf16"] < 0.9 * m["float32"],
        "exactly 0": lambda m: m["bf16"] == 0,
    },
    tempts="Each step is large enough to be seen in float32, so a part of it seems bound to survive. Rounding keeps no parts: "
    "from 1.0 a step of at most half a gap is gone, and only one that is larger than the rate can get through, as a whole gap.",
    scale=True,
)
gap = Question(
    "Validation stands above training in the figure. Where does most of that gap come from?",
    {
        "there is no gap: less than 0.02 nats": lambda m: m["mode"] + m["text"] < 0.02,
        "the mode: training chooses tokens with a look ahead, evaluation cannot": lambda m: (
            m["mode"] + m["text"] >= 0.02 and m["mode"] >= m["text"]
        ),
        "the text: files that no update has seen are harder": lambda m: (
            m["mode"] + m["text"] >= 0.02 and m["mode"] < m["text"]
        ),
    },
    tempts="That training looks ahead is true, and it is a fault one can name, so it tempts as the whole answer. An effect that "
    "exists still has to be measured.",
)
sabotage = Question(
    "Four failures are switched on in a healthy run. Which one does no watch name?",
    {
        "the learning rates, divided by 30": lambda m: m["silent"] == ["LR ÷ 30"],
        "the parameters, rounded to bf16": lambda m: m["silent"] == ["parameters to bf16"],
        "the branch that is detached": lambda m: m["silent"] == ["a detached branch"],
        "the random tokens": lambda m: m["silent"] == ["random tokens"],
        "each of them is named": lambda m: not m["silent"],
    },
    tempts="A detached branch makes the least noise in the loss, so it tempts. But that it has no gradient can be read off its "
    "tensors. A lower learning rate is nothing that can be read off: every schedule lowers it.",
)
