"""How a notebook is read: its prose in words and sentences, the claims that it cites, and its code for names that hold what a
committed results file gave."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

ID = r"(?:0\d|10)[a-z]?\.\d{1,2}"
COMMITTED = {"load_results", "load_true_size", "load_true_width", "collect", "read_verdicts"}  # who reads such files


def words_of(text: str) -> str:
    """Markdown as it is read: without comments, tags, the targets of links, fenced code."""
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"<!--.*?-->|<[^<>]+>", "", text, flags=re.DOTALL))


def terms_of(glossary: str) -> set[str]:
    """Every form in which the glossary names a term, in lower case."""
    found = set()
    for line in re.findall(r"^- (.*?)(?<!\*):", glossary.replace("**:", "**: :"), re.MULTILINE):
        for part in re.split(r"[,;()]|\bor\b", re.sub(r"[*`_]", "", line)):
            found.add(part.strip(" :").lower())
    return found - {""}


def cited(text: str) -> set[str]:
    """Claim ids in a text; `03.2 to 03.5` are four."""
    found = set(re.findall(r"\b0\d[a-z]?\.\d{1,2}\b", text))
    for inside in re.findall(r"\(([^()]*)\)", text):
        if re.fullmatch(rf"{ID}(?:(?:, | and | to |–){ID})*(?:[,;].*)?", inside):
            found |= set(re.findall(ID, inside))
    for first, last in re.findall(rf"({ID})(?: to |–)({ID})", text):
        number, start, end = *first.split("."), last.split(".")[1]
        found |= {f"{number}.{k}" for k in range(int(start), int(end) + 1)}
    return found


def sentences(text: str) -> Iterator[str]:
    """Sentences, list items and table rows of a text, headings left out; code and formulas are settings, not measurements."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#>]|\d+\. ))", text):
        if not block.lstrip().startswith("#"):
            block = re.sub(r"`[^`]*`|\$\$.*?\$\$|\$[^$]+\$", "…", block, flags=re.DOTALL)
            yield from re.split(r"(?<=[.!?:])(?:\*\*|\*|\))?\s+(?=[A-Z*\[“\"(])", block)


def names_in(*nodes: ast.AST | None) -> set[str]:
    """Names that code reads from outside; those of its own comprehensions and functions are not among them."""
    inside = [node for root in nodes if root is not None for node in ast.walk(root)]
    own = {
        name.id
        for node in inside
        if isinstance(node, ast.comprehension)
        for name in ast.walk(node.target)
        if isinstance(name, ast.Name)
    }
    if any(isinstance(root, ast.FunctionDef) for root in nodes):
        own |= {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.name for node in inside if isinstance(node, ast.FunctionDef)}
    own |= {argument.arg for node in inside if isinstance(node, ast.arguments) for argument in node.args}
    attributes = {node.attr for node in inside if isinstance(node, ast.Attribute)} & COMMITTED
    return {node.id for node in inside if isinstance(node, ast.Name)} - own | attributes


def made_by(node: ast.AST) -> list[tuple[ast.AST, ast.AST]]:
    """What a statement assigns: (target, value) pairs; of `a, b = c, d` two."""
    if isinstance(node, ast.For):
        several = [(node.target, node.iter)]
    elif isinstance(node, ast.Assign):
        several = [(target, node.value) for target in node.targets]
    else:
        several = [(node.target, node.value)] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []
    pairs = []
    for target, value in several:
        targets, values = getattr(target, "elts", [target]), getattr(value, "elts", [])
        pairs += zip(targets, values if len(values) == len(targets) else [value] * len(targets), strict=True)
    return pairs


def follow(node: ast.AST, stored: set[str]) -> None:
    """Add to `stored` the names that a statement makes of what is stored, and drop those that it makes of something else."""
    if isinstance(node, ast.FunctionDef):
        (stored.add if names_in(node) & (stored | COMMITTED) else stored.discard)(node.name)
        return
    for target, value in made_by(node):
        if names_in(value) & (stored | COMMITTED):
            stored.add(re.split(r"[\[.]", ast.unparse(target).lstrip("*"))[0])
        elif isinstance(target, ast.Name) and not isinstance(node, ast.AugAssign):
            stored.discard(target.id)
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.stmt):
            follow(inner, stored)
