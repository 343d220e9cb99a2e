"""Notebook 03a's questions; which option is right follows from what the notebook measures."""

from moe_lab.course.lessons import Question

most = Question(
    "Where do bf16 parameters cost most?",
    {
        "at the centre's LRs: they have the most to lose": lambda m: m["centre"] == max(m.values()) > 0.01,
        "at the failing LRs, the lowest": lambda m: m["failure"] == max(m.values()) > 0.01,
        "at the report's cure": lambda m: m["cure"] == max(m.values()) > 0.01,
        "nowhere: frozen norms do not matter": lambda m: max(m.values()) <= 0.01,
    },
    tempts="A run that learns much seems to have the most to lose. But its updates are large against the gaps, and arrive; it is "
    "the small ones that drown.",
)

kinds = Question(
    "Which tensors beside the norms stand perfectly still?",
    {
        "none": lambda m: not any(m.values()),
        "some matrices": lambda m: m["matrices"] > 0,
        "some of Mamba's vectors": lambda m: m["vectors"] > 0 and not m["matrices"],
        "embeddings and heads": lambda m: m["tables"] > 0 and not (m["matrices"] or m["vectors"]),
    },
    tempts='The report says none. It looked at a model without Mamba\'s vectors, and at "changed" in place of "arrived".',
)

width = Question(
    "Start values of 0.02, Muon at 1e-3. From width 192 to 1536, the share of a step that arrives",
    {
        "rises: there are more elements to catch it": lambda m: m["ratio"] > 1.05,
        "stays: the learning rate is the same": lambda m: 0.9 < m["ratio"] <= 1.05,
        "falls by about a third": lambda m: 0.3 < m["ratio"] <= 0.9,
        "falls to nearly nothing": lambda m: m["ratio"] <= 0.3,
    },
    tempts="The learning rate is the same number, so the step seems to be the same. Muon's step per element shrinks with √width, "
    "while weights of a fixed standard deviation do not.",
    scale=True,
)

fresh = Question(
    "Two untrained models. How many of their random matrices differ by more than 100 % of their length?",
    {
        "none": lambda m: m["over"] < 0.1,
        "about half": lambda m: 0.1 <= m["over"] < 0.9,
        "nearly all": lambda m: m["over"] >= 0.9,
    },
    tempts="Nothing was trained, so nothing should have changed. But two independent draws are as far apart as two points at a right "
    "angle: √2 of their length.",
    scale=True,
)

payer = Question(
    "Which kind of tensor gives back most of what bf16 costs here, when it alone stays in float32?",
    {
        "the norms, more than half of it": lambda m: m["norms"] > 0.5 * m["whole"] and m["norms"] > m["vectors"],
        "Mamba's vectors, more than half of it": lambda m: (
            m["vectors"] > 0.5 * m["whole"] and m["vectors"] > m["norms"]
        ),
        "neither of the two gives back half": lambda m: max(m["norms"], m["vectors"]) <= 0.5 * m["whole"],
    },
    tempts="What stands perfectly still looks like the culprit. How much a frozen tensor costs depends on how much the model needs it "
    "to move, which no picture of frozen weights shows.",
)

late = Question(
    "bf16, the centre's rate under a cosine to 0: what do the norm weights do?",
    {
        "they never move": lambda m: m["moved"] == 0,
        "they move to the end": lambda m: m["moved"] > 0 and m["frozen_from"] > m["n_updates"],
        "they move first and freeze in the last few updates": lambda m: (
            m["moved"] > 0 and 0.9 * m["n_updates"] < m["frozen_from"] <= m["n_updates"]
        ),
        "they move first and freeze in the last quarter or earlier": lambda m: (
            m["moved"] > 0 and m["frozen_from"] <= 0.9 * m["n_updates"]
        ),
    },
    tempts="A run that moved its norms has passed the test that the report proposes. The test was made at one learning rate; the "
    "schedule has many.",
)

norms_only = Question(
    "Norms alone in float32, at the report's cure: how much of bf16's cost comes back?",
    {
        "less than a fifth": lambda m: m["back"] < 0.2,
        "a fifth to a third": lambda m: 0.2 <= m["back"] <= 0.35,
        "about half": lambda m: 0.35 < m["back"] < 0.75,
        "nearly all": lambda m: m["back"] >= 0.75,
    },
    tempts='"Less than a fifth" was our own guess, written down before the runs. Ten times the rate moves norms too, and gives back '
    "nothing; but it moves them downwards alone, and in float32 they go where the gradient sends them.",
    scale=True,
)
