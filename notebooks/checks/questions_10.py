"""Questions of notebook 10, about its labelled example."""

from __future__ import annotations

from moe_lab.course.lessons import Question

separates = Question(
    "One look of two minutes or less is to separate the three hypotheses. Which?",
    {
        "the tokens: are they text?": lambda m: m["still"] == 0 and m["collisions"] < 3,
        "the checkpoint: how far did each kind of tensor get?": lambda m: m["still"] > 0,
        "the config: does preflight find anything in what it asks for?": lambda m: (
            m["still"] == 0 and m["findings"] > 0
        ),
    },
    tempts="Each of the other two can convict one hypothesis, and says nothing about the two that are left.",
)

cause = Question(
    "Embedding and heads stand exactly where they started. Why?",
    {
        "their updates are rounded away": lambda m: m["rounded"],
        "no gradient reaches them": lambda m: not m["rounded"] and m["cut_off"],
        "no optimizer holds them": lambda m: not m["rounded"] and not m["cut_off"] and m["without_optimizer"],
    },
    tempts="Rounding is what the report of the case found, and a detached branch looks the same in a checkpoint. The format of "
    "the weights rules out the one, and the watch the other: it saw gradients and no owner.",
)
