"""The rules of form: a notebook that keeps them all, and for every rule one that breaks it and no other."""

import re
from pathlib import Path

import nbformat
import notebook_rules
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

CARD = """# 03 · Where does it go?

| | |
| --- | --- |
| **Question** | Where? |
| **Afterwards you can** | say where |
| **Minutes to read** | 10 |
| **Minutes to run** | <!-- minutes -->smoke 0.1 · lab 0.2<!-- / --> |
| **Hardware** | two cores |
| **Read first** | nothing |"""
PROSE = (
    """## The symptom (4 minutes)

A weight stands still. Look at its [lost update](GLOSSARY.md), and at one of the [logits](GLOSSARY.md).

"""
    + "Here are more words of this kind. " * 220
)
READ = """## What it costs

*3 minutes.* The cost is <!-- 03.2 cost:.3f -->0.057<!-- / --> nats, and at most 12 % are lost (03.1, 03.2). The report said
0.004 (C05). [Others](https://example.org) found 0.7 nats. The learning rate was `0.001`, the half of $0.002$."""
END = """## Exercises

Take 0.3 nats in 40 %.

## Recap

1. one
2. two
3. three
4. four
5. five

### Would you know?

<details>a</details><details>b</details><details>c</details>

## What would break this conclusion

Much. Notebook 04 tells more.

**Terms**: lost update, Kahan summation: see
the [glossary](GLOSSARY.md). **Next**: [04](04_next.ipynb).

**Answer:** there."""
BEGIN = "from moe_lab.course import notebook\nlab = notebook.begin(profile=profile)"
CLAIM = """wide = load_results("wide")
cost, share = wide.cost(), measured()
claim("03.1", share < 0.2, "little is lost", share=share)
claim("03.2", all(c > 0 for c in [wide]), "it costs (committed runs)", cost=cost)"""
GLOSSARY = """# Glossary

- **Lost update**: one that leaves the weight as it was.
- **Kahan summation** (compensated): keeps the remainder.
- **Logit**: a score.
"""


def cells() -> list:
    """A good notebook's."""
    tagged = {"tags": ["claims"]}
    return [
        new_markdown_cell(CARD),
        new_code_cell('profile: str = ""'),
        new_code_cell(BEGIN),
        new_code_cell("lab.provenance()"),
        new_markdown_cell(PROSE),
        new_code_cell("await ask(questions_03.cause)"),
        new_code_cell(CLAIM, metadata=tagged),
        new_markdown_cell(READ),
        new_markdown_cell(END),
    ]


def broken(folder: Path, several: list) -> dict[str, list[str]]:
    (folder / "GLOSSARY.md").write_text(GLOSSARY)
    nbformat.write(new_notebook(), folder / "04_next.ipynb")
    nbformat.write(new_notebook(cells=several), folder / "03_bad.ipynb")
    return notebook_rules.broken(folder / "03_bad.ipynb")


def test_a_good_notebook_keeps_every_rule(tmp_path) -> None:
    assert broken(tmp_path, cells()) == {}


# rule, number of the good notebook's cell, what stands in it, what stands there instead, what is said
BAD = [
    ("cell_size", 5, "await", "\n".join(f"a{n} = 1" for n in range(20)) + "\nawait", "c5: 21 lines"),
    ("cell_size", 5, "await", "x = '" + "x" * 100 + "'\nawait", "c5: a line of 106 columns"),
    ("begin_names", 2, BEGIN, f"from math import {', '.join(f'a{n}' for n in range(10))}\n{BEGIN}", "c2: imports 11"),
    ("length", 4, "of this kind", "of this very long and worn and tired old kind", r"\d+ words"),
    ("length", 4, "Here are more words of this kind. ", "", r"\d+ words"),
    ("number_without_claim", 7, "The report said", "It fell to 3.21. The report said", "c7: .* It fell to 3.21"),
    ("number_without_claim", 7, "The report said", "It fell by 12 %. The report said", "c7: "),
    ("number_without_claim", 7, "The report said", "They differ by 2 nats. The report said", "c7: "),
    ("number_without_claim", 7, "The report said", "It is 3 ± 1. The report said", "c7: "),
    ("number_without_claim", 7, "C05", "the report", "c7: .*0.004"),
    ("number_without_claim", 7, "(03.1, 03.2)", "(03.1). So, (03.2)", None),
    ("number_without_claim", 7, "lost (03.1, 03.2).", "lost. So (03.1, 03.2).", "c7: "),
    ("claim_unknown", 7, "03.1, ", "03.1, 03.7, ", "c7: cites 03.7"),
    ("claim_unknown", 7, "03.2 cost", "03.2 costs", "c7: 03.2 has no number costs"),
    ("claim_unknown", 7, "03.2 cost", "04.2 cost", "c7: takes a number of 04.2"),
    ("mark_begins_line", 7, "The cost is <!--", "The cost is\n<!--", "c7: <!-- 03.2 cost:.3f --> begins a line"),
    ("claim_uncited", 7, "(03.1, 03.2)", "(03.2)", "c6: claim 03.1 is cited nowhere"),
    ("claim_uncited", 7, "(03.1, 03.2)", "(03.1 to 03.2)", None),
    ("claim_order", 6, '"03.1"', 'f"{3}"', "a claim's id must be a plain text"),
    ("claim_tag", 5, "await ask(questions_03.cause)", 'case.judge("C05", lab)', "c5: claims or judges"),
    ("reference", 8, "Notebook 04", "Notebook 04 and 07", "c8: notebook 07 does not exist"),
    ("reference", 8, "04_next.ipynb", "05_next.ipynb", "c8: 05_next.ipynb does not exist"),
    ("parts", 0, "Hardware", "Hard", "the card lacks Hardware"),
    ("parts", 0, "it go?", "it goes", "the title"),
    ("parts", 3, "lab.provenance()", "lab", "no cell prints where"),
    ("parts", 8, "5. five\n", "", "no recap"),
    ("parts", 8, "<details>a", "a", "no three folded"),
    ("parts", 8, "What would break", "Answer", "`What would break`"),
    ("parts", 8, "**Next**", "Next", "`Next`"),
    ("parts", 8, "**Terms**", "Terms", "`Terms`"),
    ("parts", 8, "**Answer", "Answer", "`Answer`"),
    ("minutes", 4, " (4 minutes)", "", "c4: section `The symptom`"),
    ("minutes", 7, "*3 minutes.* ", "", "c7: section `What it costs`"),
    ("glossary", 4, "lost update", "lost way", "`lost way` is not"),
    ("glossary", 8, "Kahan summation", "Kahan", "`kahan` is not"),
    ("answer_key", 5, "await", "right = options[0]\nawait", r"c5: options\["),
    ("answer_key", 5, "questions_03.cause", 'Question("?", {}, "")', r"c5: Question\("),
    ("committed_runs", 6, " (committed runs)", "", "c6: claim 03.2 rests"),
    ("committed_runs", 6, "measured()", "wide.share()", "c6: claim 03.1 rests"),
]


@pytest.mark.parametrize(("rule", "cell", "old", "new", "said"), BAD)
def test_a_bad_notebook_breaks_its_rule_and_no_other(tmp_path, rule, cell, old, new, said) -> None:
    several = cells()
    assert old in several[cell].source
    several[cell].source = several[cell].source.replace(old, new)
    found = broken(tmp_path, several)
    if said is None:
        assert found == {}
    else:
        also = {"claim_uncited", "claim_unknown"} if rule == "claim_order" else set()
        assert set(found) - also == {rule}
        assert any(re.match(said, message) for message in found[rule]), found[rule]


def test_ids_out_of_order_and_with_gaps_are_refused(tmp_path) -> None:
    for swap in ({"03.1": "03.2", "03.2": "03.1"}, {"03.2": "03.3"}):
        several = cells()
        for cell in several:
            cell.source = re.sub("|".join(swap), lambda found, swap=swap: swap[found[0]], cell.source)
        assert list(broken(tmp_path, several)) == ["claim_order"]


@pytest.mark.parametrize("text", ["'holds'", "<function f at 0x7f00>", "True"])
def test_a_stray_value_under_a_cell_is_refused(tmp_path, text) -> None:
    several = cells()
    data = {"text/plain": text}
    several[5].outputs = [new_output("execute_result", data=data, execution_count=1)]
    assert broken(tmp_path, several) == {"stray_out": [f"c5: Out: {text}"]}
    several[5].outputs = [new_output("execute_result", data=data | {"text/html": "<b>"}, execution_count=1)]
    assert broken(tmp_path, several) == {}


def test_three_hundred_lines_of_code_are_the_limit(tmp_path) -> None:
    several = cells()
    several[5:5] = [new_code_cell("\n".join(["x = 1"] * 20)) for _ in range(15)]
    several[-1].source += " Notebook 04."
    found = broken(tmp_path, several)
    assert list(found) == ["length"] and "309 lines" in found["length"][0]


def test_every_rule_has_a_bad_notebook() -> None:
    assert {rule for rule, *_ in BAD} | {"stray_out"} == set(notebook_rules.RULES)
