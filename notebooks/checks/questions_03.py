"""Notebook 03's questions; which option is right follows from what the notebook measures."""

from moe_lab.course.lessons import Question

curve = Question(
    "After 25 updates, how does the training loss of the bf16 run look beside that of its control?",
    {
        "it does not fall, and the control's does": lambda m: (
            m["sick"] > m["start"] - 0.1 * (m["start"] - m["control"])
        ),
        "it falls at half the pace or less": lambda m: (
            0.1 < (m["start"] - m["sick"]) / (m["start"] - m["control"]) <= 0.5
        ),
        "the two can hardly be told apart": lambda m: (m["start"] - m["sick"]) / (m["start"] - m["control"]) > 0.5,
    },
    tempts="A run whose norms are frozen ought to look broken. But norms are a few thousand of millions of numbers, the others "
    "still learn, and the loss of so short a run hides what is missing. That is why this failure lives for months.",
    scale=True,
)

cause = Question(
    "Why do the norm weights stand still?",
    {
        "no gradient reaches them: bf16 makes it zero": lambda m: m["with_gradient"] < m["looks"],
        "the optimizer moves them by nothing": lambda m: (
            m["with_gradient"] == m["looks"] and m["intended"] < m["control"] / 10
        ),
        "updates of full size are made and rounded away": lambda m: (
            m["with_gradient"] == m["looks"] and m["intended"] >= m["control"] / 10 and m["moved"] == 0
        ),
    },
    tempts='"Underflow" suggests numbers too small to be written down, and so a gradient of zero. bf16 reaches down to 1e-38 as '
    "float32 does. What it lacks is precision next to a number.",
)

lr = Question(
    "AdamW's learning rate was 3e-4. From which one on could a norm weight have left 1.0?",
    {
        "about 5e-4": lambda m: m["least_lr"] < 1e-3,
        "about 2e-3": lambda m: 1e-3 <= m["least_lr"] < 5e-3,
        "about 1e-2": lambda m: m["least_lr"] >= 5e-3,
        "none: bf16 never moves a weight of 1": lambda m: not m["least_lr"],
    },
    tempts='5e-4 is the next round number above 3e-4, and "never" is what the norms of the case suggest. Half the gap below 1, '
    "2⁻⁹ or 0.00195, over the largest step that AdamW makes decides it.",
    scale=True,
)

between = Question(
    "Updates of 2.5e-3 lie between 2⁻⁹ and 2⁻⁸. Where do weights of 1 go under fifty of them?",
    {
        "half go up, half go down": lambda m: (m["rose"], m["fell"]) == (1, 1),
        "nowhere": lambda m: (m["rose"], m["fell"]) == (0, 0),
        "those pushed down fall, those pushed up stay": lambda m: (m["rose"], m["fell"]) == (0, 1),
        "those pushed up rise, those pushed down stay": lambda m: (m["rose"], m["fell"]) == (1, 0),
    },
    tempts="Half and half treats rounding as noise that cancels. At a power of two it is a ceiling: the gap above 1 is twice the "
    "gap below.",
)

ratio = Question(
    "One update of the control. In which kind of tensor would bf16 round away the update of nearly every element?",
    {
        "in every kind of tensor: bf16 has the same seven bits everywhere": lambda m: min(m.values()) > 0.9,
        "in the norms and most of Mamba's vectors, not in the matrices": lambda m: (
            m["norms"] > 0.9 and m["vectors"] > 0.5 > m["matrices"]
        ),
        "in the norms alone, as the report says": lambda m: (
            m["norms"] > 0.9 and max(m["vectors"], m["matrices"]) <= 0.5
        ),
        "in the matrices: their updates are the smallest": lambda m: m["matrices"] > 0.9 >= m["norms"],
    },
    tempts='"Small numbers update normally" is the report\'s sentence, and it is half right: the gap shrinks with the weight. What '
    "counts is the ratio of the update to that gap, and weights of Mamba's are as large as a norm's.",
)
