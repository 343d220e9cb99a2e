"""The questions of notebook 01."""

from moe_lab.course.lessons import Question

init_std = Question(
    "You double the standard deviation of the start values. How far is the loss at step 0 above ln V?",
    {
        "as far as before: it knows nothing either way": lambda m: m["ratio"] <= 1.4,
        "about 2 times as far": lambda m: 1.4 < m["ratio"] <= 2.8,
        "about 4 times as far": lambda m: 2.8 < m["ratio"] <= 8,
        "more than 8 times as far": lambda m: m["ratio"] > 8,
    },
    tempts="A model that knows nothing should not care how it says so. But a loud opinion about nothing costs more than a "
    "quiet one, and what counts is the variance of the scores, not their deviation.",
    scale=True,
)

floors = Question(
    "Which piece of knowledge takes the most nats off the loss?",
    {
        "how frequent each token is (uniform to unigram)": lambda m: m["drops"].index(max(m["drops"])) == 0,
        "one token of context (unigram to bigram)": lambda m: m["drops"].index(max(m["drops"])) == 1,
        "a second token of context (bigram to trigram)": lambda m: m["drops"].index(max(m["drops"])) == 2,
    },
    tempts="Text is full of commas and blanks, so frequencies seem to be half the battle. They tell which tokens are common, "
    "and nothing about where they come.",
)

alike = Question(
    "Two models trained side by side. Which of them got random tokens in place of text?",
    {
        "run A": lambda m: m["random"] == ["A"],
        "run B": lambda m: m["random"] == ["B"],
        "both of them": lambda m: m["random"] == ["A", "B"],
        "neither: both read text and are starved": lambda m: m["random"] == [],
    },
    tempts="A curve that falls seems to prove that there is something to learn. A model that starts with a random opinion can "
    "also fall by giving it up. There is one hint: batches of text differ more than batches of noise, so its thin line is restless.",
)

bits = Question(
    "Take the larger of the two vocabularies. Its bigram table has, against the smaller vocabulary's,",
    {
        "fewer nats per token and fewer bits per byte": lambda m: m["nats"] < 0 and m["bits"] < 0,
        "more nats per token and fewer bits per byte": lambda m: m["nats"] > 0 and m["bits"] < 0,
        "more nats per token and more bits per byte": lambda m: m["nats"] > 0 and m["bits"] > 0,
    },
    tempts="A better number should be better in every unit. But the two units divide by different things: one by tokens, "
    "which the tokenizer makes, the other by bytes, which the text has.",
)
