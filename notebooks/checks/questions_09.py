"""Notebook 09's questions; which option is right follows from what the notebook measures."""

from moe_lab.course.lessons import Question

work = Question(
    "At 4,096 tokens an update, what share of the arithmetic is Muon's own, outside of forward and backward passes?",
    {
        "about 1 %, as its authors say": lambda m: m["share"] < 0.05,
        "about a fifth": lambda m: 0.1 < m["share"] < 0.3,
        "about two thirds": lambda m: 0.55 < m["share"] < 0.8,
        "nearly all": lambda m: m["share"] >= 0.8,
    },
    tempts="1 % is what its author gives, and at batches of half a million tokens it is right. The iteration costs the same "
    "whatever the batch, and here the batch is a hundred times smaller.",
    scale=True,
)

first_sign = Question(
    "The true run in bf16, watched. By which update can a watch prove that updates are lost?",
    {
        "update 1: it sees the dtype": lambda m: m["named_at"] == 1,
        "update 10": lambda m: 1 < m["named_at"] <= 10,
        "update 100": lambda m: 10 < m["named_at"] <= 100,
        "not before the loss stalls": lambda m: m["named_at"] > 100,
    },
    tempts="The dtype is visible at once, but it proves no harm: healthy runs keep bf16 parameters, with masters beside them. "
    "What was intended and what arrived takes a few updates to compare.",
    scale=True,
)

transfer = Question(
    "From width 96 to 192, what does Muon's best learning rate do?",
    {
        "it halves in both conventions": lambda m: m["original"] < 0.6 and m["match"] < 0.6,
        "it stays in `original` and falls in `match_rms_adamw`": lambda m: (
            0.8 < m["original"] < 1.25 and m["match"] < 0.85
        ),
        "it falls in `original` and stays in `match_rms_adamw`": lambda m: m["original"] < 0.8 and m["match"] >= 0.85,
        "it stays in both": lambda m: m["original"] > 0.85 and m["match"] >= 0.85,
    },
    tempts="A convention that imitates AdamW's step should inherit AdamW's habits, and does: AdamW's best rate falls with width. "
    "Which one stays is a matter of what the number scales.",
)
