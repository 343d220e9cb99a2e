"""The rules of a notebook's form (NOTEBOOKS.md has the reasons), one function each; tests/test_notebook_rules.py has a bad
notebook for every one of them.

    python tests/notebook_rules.py notebooks/03_bf16_underflow.ipynb     # all of them without a name
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import nbformat
from notebook_reading import COMMITTED, ID, cited, follow, names_in, sentences, terms_of, words_of

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
VALUE = re.compile(rf"<!-- ({ID}) ([\w.]+)(:\S+)? -->(.*?)<!-- / -->")
# a sentence that cites nothing and says one of these says a measured number without its claim
MEASURED = re.compile(
    r"±\s*\d|(?<![\w.^-])\d+\.\d*[1-9]\d*(?![\w.]*[\d(]| [mb]illion)|\d\s*%|\b\d[\d,]*\s+(?:nats?|tokens/s|GFLOP/s|bits per byte)\b"
)
CARD = ("Question", "Afterwards you can", "Minutes to read", "Minutes to run", "Hardware", "Read first")
UNTIMED = re.compile(r"Exercises|Recap|What would break|Would you know|Terms|Answer|Next", re.IGNORECASE)


@dataclass
class Page:
    """A notebook, and what of the others a rule needs to know."""

    path: Path
    glossary: str = ""
    elsewhere: set[str] = field(default_factory=set)  # claim ids of the other notebooks

    @cached_property
    def cells(self) -> list:
        return nbformat.read(self.path, as_version=4).cells

    @property
    def code(self) -> list[tuple[int, nbformat.NotebookNode]]:
        return [(n, cell) for n, cell in enumerate(self.cells) if cell.cell_type == "code" and cell.source.strip()]

    @property
    def prose(self) -> list[tuple[int, str]]:
        return [(n, cell.source) for n, cell in enumerate(self.cells) if cell.cell_type == "markdown"]

    @property
    def number(self) -> str:
        return self.path.stem.split("_")[0]

    @cached_property
    def trees(self) -> list[tuple[int, ast.Module]]:
        parsed = []
        for n, cell in self.code:
            lines = [line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))]
            parsed.append(
                (n, compile("\n".join(lines), "cell", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT))
            )
        return parsed

    def calls(self, *names: str) -> list[tuple[int, ast.Call]]:
        """Calls of functions or methods of these names, by cell, in order."""
        found = []
        for n, tree in self.trees:
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            calls = [call for call in calls if ast.unparse(call.func).split(".")[-1] in names]
            found += [(n, call) for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset))]
        return found

    @cached_property
    def claims(self) -> list[tuple[int, str, ast.Call]]:
        ids = [(n, call.args[0] if call.args else None, call) for n, call in self.calls("claim")]
        return [
            (n, id.value, call) for n, id, call in ids if isinstance(id, ast.Constant) and re.match(ID, str(id.value))
        ]

    def before(self, heading: str) -> list[tuple[int, str]]:
        """The prose above a heading of the second level."""
        last = next((n for n, text in self.prose if re.search(rf"^## .*{heading}", text, re.MULTILINE)), 10**6)
        return [(n, text) for n, text in self.prose if n < last]


RULES: dict[str, Callable[[Page], Iterator[str]]] = {}


def rule(check: Callable[[Page], Iterator[str]]) -> Callable:
    RULES[check.__name__] = check
    return check


@rule
def cell_size(page: Page) -> Iterator[str]:
    """A code cell has at most 20 lines (empty ones not counted) and 100 columns."""
    for n, cell in page.code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if len(lines) > 20:
            yield f"c{n}: {len(lines)} lines of code; 20 is the limit"
        if (widest := max(map(len, lines))) > 100:
            yield f"c{n}: a line of {widest} columns; 100 is the limit"


@rule
def begin_names(page: Page) -> Iterator[str]:
    """The cell that begins imports at most ten names."""
    for n, tree in page.trees:
        names = [name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
        if "begin(" in page.cells[n].source and len(names) > 10:
            yield f"c{n}: imports {len(names)} names; 10 is the limit"


@rule
def length(page: Page) -> Iterator[str]:
    """At most 300 lines of code, 1,500 to 3,000 words."""
    if (n := sum(bool(line.strip()) for _, cell in page.code for line in cell.source.splitlines())) > 300:
        yield f"{n} lines of code; 300 is the limit"
    n = sum(bool(re.search(r"\w", word)) for _, text in page.prose for word in words_of(text).split())
    if not 1500 <= n <= 3000:
        yield f"{n} words; 1,500 to 3,000 are allowed"


@rule
def number_without_claim(page: Page) -> Iterator[str]:
    """A sentence with a measured number cites its claim (03.2), the case's (C05, B08), or a source by a link. Numbers in
    `code` and $formulas$ are settings, not measurements; exercises give numbers of their own."""
    for n, text in page.before("Exercises")[1:]:
        for sentence in sentences(text):
            value, shown = VALUE.search(sentence), words_of(sentence)
            source = cited(sentence) or re.search(r"\b[CB]\d\d\b|\]\(https?:|\*\d[^*]* minutes?\*", sentence)
            if (value and not cited(words_of(sentence))) or (MEASURED.search(shown) and not source):
                yield f"c{n}: a number without a claim's id: {' '.join(shown.split())[:90]}"


@rule
def claim_unknown(page: Page) -> Iterator[str]:
    """A claim that is cited exists, and has the number that prose takes from it."""
    own = {id: {keyword.arg for keyword in call.keywords} for _, id, call in page.claims}
    for n, text in page.prose:
        for id in sorted(cited(words_of(text)) - set(own) - page.elsewhere):
            yield f"c{n}: cites {id}, which no notebook claims"
        for id, name, *_ in VALUE.findall(text):
            if id not in own:
                yield f"c{n}: takes a number of {id}, which this notebook does not claim"
            elif name.split(".")[0] not in own[id] and None not in own[id]:
                yield f"c{n}: {id} has no number {name}"


@rule
def mark_begins_line(page: Page) -> Iterator[str]:
    """A number's mark does not begin a line: there a comment is a block of HTML, which breaks the paragraph."""
    for n, text in page.prose:
        for mark in re.findall(rf"^ {{0,3}}<!-- ({ID} [^>]*?) -->", text, re.MULTILINE):
            yield f"c{n}: <!-- {mark} --> begins a line"


@rule
def claim_uncited(page: Page) -> Iterator[str]:
    """Every claim is cited in prose."""
    known = set().union(*(cited(words_of(text)) for _, text in page.prose))
    for n, id, _ in page.claims:
        if id not in known:
            yield f"c{n}: claim {id} is cited nowhere"


@rule
def claim_order(page: Page) -> Iterator[str]:
    """Ids are NN.1 to NN.k, in the order in which they stand."""
    ids, calls = [id for _, id, _ in page.claims], page.calls("claim")
    if ids != (wanted := [f"{page.number}.{k}" for k in range(1, len(ids) + 1)]):
        n, id, want = next((n, id, want) for (n, id, _), want in zip(page.claims, wanted, strict=True) if id != want)
        yield f"c{n}: claim {id} should be {want}"
    if len(calls) != len(ids):
        yield "a claim's id must be a plain text in its call"


@rule
def claim_tag(page: Page) -> Iterator[str]:
    """Cells that claim or judge carry the tag `claims`."""
    for n in sorted({n for n, _ in page.calls("claim", "judge")}):
        if "claims" not in page.cells[n].metadata.get("tags", []):
            yield f"c{n}: claims or judges without the tag `claims`"


@rule
def reference(page: Page) -> Iterator[str]:
    """Notebooks and files that are named exist."""
    numbers = {path.stem.split("_")[0] for path in page.path.parent.glob("*.ipynb")}
    for n, text in page.prose:
        for found in re.findall(r"[Nn]otebooks? ((?:\d\d[a-z]?(?:, | and | or | to )?)+)", text):
            for number in set(re.findall(r"\d\d[a-z]?", found)) - numbers:
                yield f"c{n}: notebook {number} does not exist"
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#")) and not (page.path.parent / target.split("#")[0]).exists():
                yield f"c{n}: {target} does not exist"


@rule
def stray_out(page: Page) -> Iterator[str]:
    """No `Out[3]: 'holds'`: a value that nobody reads."""
    for n, cell in page.code:
        for output in cell.outputs:
            text = "".join(output.get("data", {}).get("text/plain", ""))
            alone = output.output_type == "execute_result" and set(output.data) == {"text/plain"}
            if alone and re.match(r"""['"]|<.* at 0x|True$|False$|Ellipsis$""", text):
                yield f"c{n}: Out: {text[:40]}"


@rule
def parts(page: Page) -> Iterator[str]:
    """Card, provenance, recap of five lines, three recall questions, what would break it, terms, next, the answer."""
    first, everything = page.cells[0].source, "\n".join(text for _, text in page.prose)
    if missing := [name for name in CARD if f"| **{name}** |" not in first]:
        yield f"the card lacks {', '.join(missing)}"
    if not re.match(r"# \d\d[a-z]? · .*\?$", first.splitlines()[0]):
        yield "the title must be `# NN · a question?`"
    if len(page.calls("provenance")) == 0:
        yield "no cell prints where this comes from: lab.provenance()"
    recap = re.search(r"^## Recap\s*\n(.*?)(?=\n\*\*|\n#|\Z)", everything, re.DOTALL | re.MULTILINE)
    if not recap or len(re.findall(r"^\d\. ", recap[1], re.MULTILINE)) != 5:
        yield "no recap of five numbered lines under `## Recap`"
    recall = re.search(r"### would you know\?(.*?)(?=\n##|\Z)", everything, re.DOTALL | re.IGNORECASE)
    if not recall or recall[1].count("<details") < 3:
        yield "no three folded answers under `Would you know?`"
    for name in ("What would break", "**Terms**", "**Next**", "**Answer"):
        if name not in everything:
            yield f"`{name.strip('*')}` is missing"


@rule
def minutes(page: Page) -> Iterator[str]:
    """A section says its minutes in its heading or the line after it."""
    for n, text in page.prose:
        for heading, rest in re.findall(r"^## ([^\n]*)\n?((?:\s*\S[^\n]*)?)", text, re.MULTILINE):
            if not UNTIMED.search(heading) and not re.search(r"\d minutes?", heading + rest):
                yield f"c{n}: section `{heading}` does not say its minutes"


@rule
def glossary(page: Page) -> Iterator[str]:
    """Words that are linked to the glossary, and the terms at the end, are in it."""
    known = terms_of(page.glossary)
    everything = "\n".join(re.sub(r"(?<!\n)\n(?!\n)", " ", text) for _, text in page.prose)
    words = re.findall(r"\[([^\]]+)\]\(GLOSSARY\.md[^)]*\)", everything)
    if ending := re.search(r"\*\*Terms\*\*:(.*?)(?=: see|\(see|; see|\. See|\[gloss|\n\n|\Z)", everything, re.DOTALL):
        words += re.split(r",|;", re.sub(r"\([^)]*\)|\]\([^)]*\)|\[", "", ending[1]))
    for word in dict.fromkeys(" ".join(re.sub(r"[*`_\[\]]", "", word).split()).strip(" .:").lower() for word in words):
        forms = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub(r"ies$", "y", word)}
        if word not in ("", "glossary", "the glossary") and not forms & known:
            yield f"`{word}` is not in GLOSSARY.md"


@rule
def answer_key(page: Page) -> Iterator[str]:
    """No notebook holds the answers of its questions: they stand in checks/questions_NN.py."""
    for n, cell in page.code:
        if found := re.search(r"\boptions\[|\bPredictions\(|\bpredictions\.|\bQuestion\(", cell.source):
            yield f"c{n}: {found[0]}… in a cell: questions stand in checks/questions_NN.py"


@rule
def committed_runs(page: Page) -> Iterator[str]:
    """A claim that rests on a committed results file says so at its end."""
    stored: set[str] = set()
    for n, tree in page.trees:
        claims = [(id, call) for cell, id, call in page.claims if cell == n]
        for statement in tree.body:
            follow(statement, stored)
            for id, call in claims:
                if not statement.lineno <= call.lineno <= statement.end_lineno or len(call.args) < 3:
                    continue
                said = isinstance(call.args[2], ast.Constant) and str(call.args[2].value).endswith("(committed runs)")
                if names_in(call.args[1]) & (stored | COMMITTED) and not said:
                    yield f"c{n}: claim {id} rests on a committed file and does not end in (committed runs)"


def claim_ids(path: Path) -> set[str]:
    return {id for _, id, _ in Page(path).claims}


def broken(path: Path) -> dict[str, list[str]]:
    """What each rule finds; a rule that finds nothing is not in it."""
    others = [other for other in path.parent.glob("[0-9]*.ipynb") if other != path]
    glossary = path.parent / "GLOSSARY.md"
    text = glossary.read_text(encoding="utf-8") if glossary.exists() else ""
    page = Page(path, text, set().union(*map(claim_ids, others)))
    found = {name: list(check(page)) for name, check in RULES.items()}
    return {name: messages for name, messages in found.items() if messages}


if __name__ == "__main__":
    several = [Path(name).resolve() for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    for path in several:
        for name, messages in broken(path).items():
            print(*(f"{path.stem}: {name}: {message}" for message in messages), sep="\n")
