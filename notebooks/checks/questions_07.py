"""Questions of notebook 07."""

from moe_lab.course.lessons import Question

how_many = Question(
    "Of the report's 21 claims, how many hold exactly as they were written?",
    {
        "fewer than a third": lambda m: m["holds"] < 7,
        "about half (7 to 13)": lambda m: 7 <= m["holds"] <= 13,
        "about two thirds (14 to 17)": lambda m: 14 <= m["holds"] <= 17,
        "nearly all": lambda m: m["holds"] > 17,
    },
    tempts="A report that names the right two causes reads as if it were right in general. A right diagnosis does not carry "
    "over to the sentences around it: each of them is a claim of its own, about a rate, a range or a reason.",
    scale=True,
)

missing = Question(
    "You delete one entry from the record. What should the ledger say about that claim?",
    {
        "what it said before": lambda m: m["outcome"] == m["before"] != "open",
        "that it does not hold": lambda m: m["outcome"] == "does not hold",
        "that it is open": lambda m: m["outcome"] == "open",
        "nothing: the row disappears": lambda m: m["outcome"] is None,
    },
    tempts="'It does not hold' tempts, since nothing supports the claim any more. But the absence of a measurement is not a "
    "measurement: who turns one into the other refutes claims by deleting files.",
)
