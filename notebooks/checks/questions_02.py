"""Predictions of notebook 02: each option with the test that tells whether the measured values say it."""

from moe_lab.course.lessons import Question

active = Question(
    "The case has 8 experts and sends each token to 2. Which share of all parameters computes one token?",
    {
        "a quarter": lambda m: m["share"] < 0.4,
        "about three fifths": lambda m: 0.5 < m["share"] < 0.7,
        "about nine tenths": lambda m: m["share"] > 0.8,
    },
    tempts="Two of eight is a quarter, and that is true of the experts. But only half of the model is experts; the "
    "embedding, the heads, attention and Mamba compute every token.",
    scale=True,
)

balance = Question(
    "All tokens go to the same K experts, with almost equal probabilities. What does the balance loss read?",
    {
        "E / K: the experts have collapsed": lambda m: abs(m["reading"] - m["worst"]) < 0.1,
        "about 1: as if all were even": lambda m: abs(m["reading"] - 1) < 0.1,
        "0: no expert gets a gradient": lambda m: abs(m["reading"]) < 0.1,
    },
    tempts="E / K is what the formula gives for a collapse of a router that is sure. This one is not: equal "
    "probabilities cancel out of the sum, whatever the loads are.",
)

forget = Question(
    "With dt_proj.bias at zero: what is left of a token in Mamba's slowest state 20 tokens later?",
    {
        "about four fifths": lambda m: m["left"] > 0.5,
        "about a fifth": lambda m: 0.01 < m["left"] < 0.5,
        "about a millionth": lambda m: m["left"] < 1e-4,
    },
    tempts="Zero sounds like a small step size. But the step size is softplus(bias), and softplus(0) is ln 2: every "
    "token halves the state, and twenty halvings leave a millionth.",
    scale=True,
)

skipped = Question(
    "B03 adds a copy of the residual to the residual. A token is skipped by both sublayers of a layer. How large does "
    "it leave the layer?",
    {
        "as it came: it was skipped": lambda m: m["ratio"] == 1,
        "twice as large": lambda m: m["ratio"] == 2,
        "four times as large": lambda m: m["ratio"] == 4,
    },
    tempts="'Skipped' sounds like 'untouched'. In B03 nothing was computed for the token, and its copy was added all "
    "the same, once in each of two sublayers.",
    scale=True,
)

leak = Question(
    "Mixture-of-Depths in training mode, without any bug: which test sees a leak from the future?",
    {
        "neither: order and mask make it causal": lambda m: m["perturbed"] == 0 and m["gradient"] == 0,
        "perturbation does, the gradient does not": lambda m: m["perturbed"] > 1e-3 and m["gradient"] == 0,
        "both do": lambda m: m["perturbed"] > 1e-3 and m["gradient"] > 0,
    },
    tempts="Values do travel causally here: the rows are in order and the mask is right. The future comes in through "
    "the choice of the rows, which no derivative sees.",
)

gap = Question(
    "The same 64 tokens, the same weights, and with MoD the loss in evaluation mode is higher than in training mode. "
    "Why?",
    {
        "dropout: it disturbs only one of the two modes": lambda m: m["dropout"] > 0,
        "the predictor computes other tokens than the router": lambda m: (
            m["dropout"] == 0 and m["computed"] < 1 and m["gap_after"] < 0.1 * m["gap_before"]
        ),
        "evaluation leaves Mixture-of-Depths out (B06)": lambda m: m["computed"] == 1,
        "overfitting: evaluation is always worse": lambda m: (
            m["dropout"] == 0 and m["computed"] < 1 and m["gap_after"] >= 0.1 * m["gap_before"]
        ),
    },
    tempts="A gap between training and evaluation is called overfitting so often that the name comes by itself. "
    "Overfitting is a gap between two texts; here both modes read the same one.",
)
