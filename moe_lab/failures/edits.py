"""A bug as an edit: a few words of a healthy function's source are replaced while a `with` block runs."""

import __future__

import inspect
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

NUMBERS = count(1)


class Edit(NamedTuple):
    """`old`, which stands once in the source of `owner.name`, becomes `new`. `owner`: a class, or a module."""

    owner: Any
    name: str
    old: str
    new: str


def source_of(function: Callable) -> str:
    return textwrap.dedent(inspect.getsource(function))


def edited(source: str, edits: Iterable[Edit]) -> str:
    """Raises ValueError where a text to be replaced does not stand there once: the healthy code has moved on."""
    for edit in edits:
        if (n := source.count(edit.old)) != 1:
            raise ValueError(f"{edit.name}: {edit.old.strip()!r} stands there {n} times; the edit needs it once")
        source = source.replace(edit.old, edit.new)
    return source


def compiled(function: Callable, source: str) -> Callable:
    """`source` in the place of a function, with the function's own globals; `inspect.getsource` knows its lines."""
    plain = inspect.unwrap(function)
    file = f"<edited {plain.__qualname__} {next(NUMBERS)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    made: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag
    exec(compile(source, file, "exec", flags, dont_inherit=True), plain.__globals__, made)
    return made[plain.__name__]


def places(owner: Any, name: str) -> list[Any]:
    """What holds the function: its class, or every loaded module of ours that imported it."""
    if not isinstance(owner, ModuleType):
        return [owner]
    function, ours = getattr(owner, name), ("moe_lab", "benchmarks", "checks")
    loaded = [module for key, module in list(sys.modules.items()) if key.split(".")[0] in ours]
    return [module for module in loaded if vars(module).get(name) is function]


def by_function(edits: Iterable[Edit]) -> dict[tuple[Any, str], list[Edit]]:
    found: dict[tuple[Any, str], list[Edit]] = {}
    for edit in edits:
        found.setdefault((edit.owner, edit.name), []).append(edit)
    return found


@contextmanager
def applied(edits: Iterable[Edit]) -> Iterator[None]:
    """All of them while the block runs; afterwards everything is as it was."""
    with ExitStack() as stack:
        for (owner, name), several in by_function(edits).items():
            healthy = getattr(owner, name)
            sick = compiled(healthy, edited(source_of(healthy), several))
            for place in places(owner, name):
                stack.enter_context(patch.object(place, name, sick))
        yield
