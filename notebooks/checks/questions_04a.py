"""Questions of notebook 04a. Exactly one option is true of what is measured."""

from __future__ import annotations

from moe_lab.course.lessons import Question

settles = Question(
    "The failing run ends level with the unigram table. Run it on, four times as long: what will its loss do?",
    {
        "it stays at the unigram table": lambda m: m["crossed"] and m["last"] > m["unigram"] - 0.1,
        "it crosses the table and keeps falling": lambda m: m["crossed"] and m["last"] <= m["unigram"] - 0.1,
        "it never reaches the table": lambda m: not m["crossed"],
    },
    tempts="A curve that flattens just above a named line looks as if the line held it. Nothing does: the run is slow there "
    "because its steps are short, and slow is not stuck.",
)
culprit = Question(
    "Four suspects for a loss that hardly falls. Which one will the measurements leave?",
    {
        "the tokens are random": lambda m: m["collisions"] < 3,
        "updates are rounded away": lambda m: m["collisions"] >= 3 and m["moved"] < 0.5,
        "some tensors get no gradient": lambda m: m["collisions"] >= 3 and m["moved"] >= 0.5 and m["gradient"] < 1,
        "one of the learning rates is too low": lambda m: (
            m["collisions"] >= 3 and m["moved"] >= 0.5 and m["gradient"] == 1
        ),
    },
    tempts="All four leave the same curve behind. That is why the curve is a symptom and not a diagnosis.",
)
corner = Question(
    "From the failure, with one LR changed to the cure's. Which change takes more off the loss, at width 96?",
    {
        "Muon's, 3e-4 to 1e-3": lambda m: m["muon"] - m["adamw"] >= 0.1,
        "AdamW's, 9e-5 to 3e-4": lambda m: m["adamw"] - m["muon"] >= 0.1,
        "both the same, within 0.1 nats": lambda m: abs(m["adamw"] - m["muon"]) < 0.1,
    },
    tempts="The report says Muon's, and Muon moves most of the parameters. But a token comes in through an embedding and "
    "goes out through a head, and AdamW moves these.",
)
rule = Question(
    "A rule says: update over weight about 1e-3. Within a factor of 3, on Muon's matrices, which run does it call healthy?",
    {
        "the healthy run only": lambda m: m["healthy"] and not m["sick"],
        "the sick run only": lambda m: m["sick"] and not m["healthy"],
        "both": lambda m: m["sick"] and m["healthy"],
        "neither": lambda m: not m["sick"] and not m["healthy"],
    },
    tempts="The rule is right for many runs, late in their schedules. Its denominator is the weight, and a fresh matrix is "
    "as small as its init made it.",
)
reach = Question(
    "After 102 updates of the case's warm-up, 0.004 is which share of the most that any norm weight could have moved?",
    {
        "less than 1 %": lambda m: m["share"] < 0.01,
        "about 10 %": lambda m: 0.01 <= m["share"] < 0.2,
        "about 30 %": lambda m: 0.2 <= m["share"] < 0.6,
        "more than 60 %": lambda m: m["share"] >= 0.6,
    },
    tempts="0.004 beside 1.0 looks like nothing. The yardstick is not the weight but the sum of the learning rates.",
    scale=True,
)
