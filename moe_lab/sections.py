"""How the sections of moe_lab.config are checked, and what YAML and a command line say. Errors are one line."""

import difflib
import inspect
import math
import operator
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import yaml

# what files of before hold: fields of `model` that are gone, at what is done now
GONE = {"mamba_kernel": "torch", "moe_capacity_factor": None}
NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
BOUNDS = {">": ("more than", operator.gt), ">=": ("at least", operator.ge)}
BOUNDS |= {"<": ("less than", operator.lt), "<=": ("at most", operator.le)}


class ConfigError(ValueError):
    """The user's input is wrong. One line: the field or file, the value, what to do."""

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: IPython asks the exception, and a reader's typo is no bug to look for in the package."""
        return [f"error: {self}"]


@dataclass
class SectionHelp:
    """A section's docstring, with the lines of its fields wherever the source is at hand; read when help asks."""

    name: str
    text: str

    def __get__(self, instance: Any, section: type) -> str:
        try:
            source = inspect.getsource(section)
        except (OSError, TypeError):
            return self.text
        lines = re.findall(r"^    \w+: .* = .*  # .*\n", source, re.MULTILINE)
        return f"{self.text}\n\nFields of the YAML section `{self.name}`:\n\n{''.join(lines)}"


def section(cls: type) -> type:
    """Make `ModelConfig` the frozen dataclass of the YAML section `model`, which is checked whenever one is built."""
    name = cls.__name__.removesuffix("Config").lower()

    def check(self) -> None:
        for key, hint in cls.hints.items():
            check_value(f"{name}.{key}", getattr(self, key), hint)
        for message in getattr(self, "conflicts", tuple)():
            raise ConfigError(f"{name}.{message}")

    cls.hints = typing.get_type_hints(cls, include_extras=True)
    cls.__post_init__ = check
    made = dataclass(frozen=True, kw_only=True)(cls)
    made.__doc__ = SectionHelp(name, cls.__doc__)
    return made


def build(kind: type, values: Any, section: str = "") -> Any:
    """A dataclass, of sections or of a section's fields, from a dict. Raises ConfigError."""
    if not isinstance(values, dict):
        what = f"section {section} must hold keys and values" if section else "expected sections such as `model:`"
        raise ConfigError(f"{what}, got {values!r}")
    hints, arguments = typing.get_type_hints(kind), {}
    for name, value in values.items():
        if section == "model" and (name, value) in GONE.items():
            continue
        if name not in hints:
            what = f"key {section}.{name}" if section else f"section {name!r}"
            raise ConfigError(f"unknown {what}{suggestion(str(name), hints)}")
        if is_dataclass(hints[name]):
            value = build(hints[name], value, name)
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def check_value(where: str, value: Any, hint: Any) -> None:
    """Raise ConfigError unless the value is of this type and in its range. True is no number, "1" neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if types.NoneType in arguments:
        if value is not None:
            check_value(where, value, arguments[0])
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(f"{where}={value!r} must be a list, such as [1, 2]")
        for index, item in enumerate(value):
            check_value(f"{where}[{index}]", item, arguments[0])
    elif origin is typing.Literal:
        if value not in arguments:
            near = suggestion(str(value), arguments)
            raise ConfigError(f"{where}={value!r} is not one of {', '.join(arguments)}{near}")
    elif origin is typing.Annotated:
        check_value(where, value, arguments[0])
        for symbol, limit in map(str.split, arguments[1:]):
            words, holds = BOUNDS[symbol]
            if not holds(value, float(limit)):
                raise ConfigError(f"{where}={value!r} must be {words} {limit}")
    else:
        fits = isinstance(value, (int, float) if hint is float else hint)
        if fits and hint in (int, float):
            fits = not isinstance(value, bool) and math.isfinite(value)
        if not fits:
            raise ConfigError(f"{where}={value!r} must be {NAMES[hint]}")


def suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


class Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; a config must not."""

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            problem = None
            if not isinstance(key, yaml.ScalarNode) or "\n" in key.value:
                problem = "a key must be a word"
            elif key.value in seen:
                problem = f"the key {key.value!r} stands here and in line {seen[key.value]}"
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what the Loader would take for a number."""


# PyYAML takes 1.0e-3 for a number and 1e-3 for text; YAML 1.2 takes both for numbers
FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
yaml.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"), Loader, Dumper)


def parse_yaml(text: str, origin: str) -> Any:
    """Plain values. Raises ConfigError where the text is not YAML: `origin`, the line, why."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{line}: not valid YAML: {' '.join(problem.split())}") from None


def parse_word(text: str, hint: Any, origin: str) -> Any:
    """What a word of a command line says where a value of this type is wanted: YAML; but a text is what stands there, 2024
    and *.txt too, unless it is quoted or null. Raises as `parse_yaml`."""
    is_plain = text not in ("", "~", "null") and text[0] not in "'\""
    return text if is_plain and hint in (str, str | None) else parse_yaml(text, origin)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises ConfigError: missing, not a file, not UTF-8, not YAML, empty."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = suggestion(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise ConfigError(f"{path}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise ConfigError(f"{path}: the file is empty; a config holds sections such as `model:`")
    return values
