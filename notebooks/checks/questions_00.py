"""The questions of notebook 00."""

from moe_lab.course.lessons import Question

learned = Question(
    "The two upper curves fall during the whole run. What have these models learned by its end?",
    {
        "nothing: a loss that falls so slowly is noise": lambda m: m["best_upper"] > m["uniform"] - 0.2,
        "which tokens are frequent, and hardly more": lambda m: (
            m["uniform"] - 0.2 >= m["best_upper"] > m["unigram"] - 0.2
        ),
        "what tends to follow what, as a model should": lambda m: m["best_upper"] <= m["unigram"] - 0.2,
    },
    tempts="A curve that falls looks like learning. But frequencies alone are worth more than a nat, and a table of counts "
    "has them without any training. Hold the end of a curve against the tables before you call it progress.",
)

bf16 = Question(
    "On this machine, how does the speed of bf16 matrix products compare with float32?",
    {
        "slower": lambda m: m["ratio"] <= 1,
        "about the same (up to 1.3 times)": lambda m: 1 < m["ratio"] <= 1.3,
        "about twice as fast (1.3 to 3 times)": lambda m: 1.3 < m["ratio"] <= 3,
        "more than 3 times as fast": lambda m: m["ratio"] > 3,
    },
    tempts="Half the bits suggest half the time, and for reading memory that is right. Products need circuits of their own: "
    "with them bf16 can be several times faster, without them it is emulated and slower. A product as small as this one, or a busy "
    "machine, shows less of either.",
    scale=True,
)

minutes = Question(
    "How many minutes will the training inside notebook 05 take on this machine, in this profile and without the rest of 05?",
    {
        "less than 1": lambda m: m["minutes"] <= 1,
        "1 to 5": lambda m: 1 < m["minutes"] <= 5,
        "5 to 30": lambda m: 5 < m["minutes"] <= 30,
        "more than 30": lambda m: m["minutes"] > 30,
    },
    tempts="The number of parameters says little: tokens, updates and the kind of processor decide, and a second program on "
    "the same cores can cost more than all of them.",
    scale=True,
)
