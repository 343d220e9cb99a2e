"""From YAML to frozen dataclasses and back, whatever their fields: types, ranges, overrides, one-line errors.

A config is a dataclass of sections; a section is a class under `@section`, whose fields are `option`s. `moe_lab.config`
holds them, and hands on what others need from here.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}  # functions of `operator`


class ConfigError(ValueError):
    """The user's input is wrong. One line: the field or file, the value, what to do."""


def option(default: Any, meaning: str, *, choices: tuple | None = None, **bounds: float) -> Any:
    """A dataclass field with its meaning and its range (ge, gt, le, lt), checked for numbers and each number in a list."""
    return field(default=default, metadata={"meaning": meaning, "choices": choices, "bounds": bounds})


def section(name: str):
    """Freeze a dataclass, name its YAML section, write its table of fields into its docstring, and `check` each instance."""

    def decorate(cls):
        cls.__post_init__ = check
        cls = dataclass(frozen=True, kw_only=True)(cls)
        rows = [f"    {f.name}: {f.type} = {f.default!r}\n        {f.metadata['meaning']}" for f in fields(cls)]
        cls.__doc__ = f"{cls.__doc__}\n\nFields of the YAML section `{name}`:\n\n" + "\n".join(rows) + "\n"
        cls.section_name = name
        return cls

    return decorate


def check(values: Any) -> None:
    """Raise ConfigError for the first field whose type or range is wrong, then for the first of the section's `conflicts`."""
    hints = typing.get_type_hints(type(values))
    for f in fields(values):
        where, value = f"{values.section_name}.{f.name}", getattr(values, f.name)
        check_type(where, value, hints[f.name])
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"{where}={value!r} is not one of {', '.join(choices)}{suggestion(str(value), choices)}")
        numbers = value if isinstance(value, tuple) else [value]
        for name, bound in f.metadata["bounds"].items():
            if not all(number is None or getattr(operator, name)(number, bound) for number in numbers):
                raise ConfigError(f"{where}={printed(value)} must be {BOUNDS[name]} {bound}")
    for message in getattr(values, "conflicts", tuple)():
        raise ConfigError(message)


def check_type(where: str, value: Any, expected: Any) -> None:
    """Raise ConfigError unless `value` is of the annotated type. True is no number and "1e-3" is text."""
    if isinstance(expected, types.UnionType):
        if value is None:
            return
        expected = typing.get_args(expected)[0]  # … | None
    if typing.get_origin(expected) is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(f"{where}={printed(value)} must be a list, such as [1, 2]")
        for index, item in enumerate(value):
            check_type(f"{where}[{index}]", item, typing.get_args(expected)[0])
        return
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[expected]
    is_number = expected in (int, float)
    fits = isinstance(value, (int, float) if expected is float else expected)
    if fits and not (is_number and (isinstance(value, bool) or not math.isfinite(value))):
        return
    hint = ""
    if is_number and isinstance(value, str) and value != number_in(value):
        hint = f"; it is text, since YAML wants a point in an exponent: write {yaml.safe_dump(number_in(value)).split()[0]}"
    raise ConfigError(f"{where}={printed(value)} must be {wanted}{hint}")


def number_in(value: Any) -> Any:
    """The finite number that a text says, such as 1e-3, as a float; any other value as it is."""
    try:
        return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
    except ValueError:
        return value


def printed(value: Any) -> str:
    return repr(list(value) if isinstance(value, tuple) else value)


def suggestion(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; a config must not."""

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or "\n" in key_node.value:
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} stands here and in line {seen[key_node.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> Any:
    """Parse one YAML file. Raises ConfigError: missing, not a file, not UTF-8, bad YAML (with its line), empty."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise ConfigError(f"{path}: no such file{f'; did you mean {path.parent / near[0]}?' if near else ''}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = yaml.load(text, Loader=UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {' '.join(problem.split())}") from None
    if values is None:
        raise ConfigError(f"{path}: the file is empty; a config holds sections such as `model:`")
    return values


def build(kind: type, values: Any, origin: str) -> Any:
    """A config of class `kind` from nested dicts, as `to_dict` gives them. Raises ConfigError; `origin` starts its messages."""
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: expected sections such as `model:`, got {type(values).__name__}")
    sections, parts = typing.get_type_hints(kind), {}
    for name, entries in values.items():
        if name not in sections:
            raise ConfigError(f"{origin}: unknown section {name!r}{suggestion(str(name), sections)}")
        if not isinstance(entries, dict):
            raise ConfigError(f"{origin}: section {name} must hold keys and values, got {printed(entries)}")
        known = [f.name for f in fields(sections[name])]
        for key in entries:
            if key not in known:
                raise ConfigError(f"{origin}: unknown key {name}.{key}{suggestion(str(key), known)}")
        entries = {key: tuple(value) if isinstance(value, list) else value for key, value in entries.items()}
        try:
            parts[name] = sections[name](**entries)
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from None
    return kind(**parts)


def load(kind: type, path: str | Path, overrides: typing.Sequence[str]) -> Any:
    """A config of class `kind` from one YAML file and overrides such as `training.steps=200`. Raises ConfigError."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r} must be a list of texts, such as [{overrides!r}]")
    values = read_yaml(path)
    build(kind, values, str(path))  # the file must be right by itself, so that its errors carry its name
    for text in overrides:
        name, key, value = parse_override(kind, text)
        values.setdefault(name, {})[key] = value
    return build(kind, values, "override" if overrides else str(path))


def parse_override(kind: type, text: str) -> tuple[str, str, Any]:
    """`training.steps=200` → ("training", "steps", 200). The field's type decides what the value is.

    In a text field what stands there is the text, 2024 and *.txt too, unless it is quoted or null. Elsewhere it is YAML, but
    here, on a command line, 1e-3 is a number, in a list too.
    """
    path, equals, value = text.partition("=")
    name, dot, key = path.strip().partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"override {text!r} must read section.key=value, such as training.steps=200")
    section_class, value = typing.get_type_hints(kind).get(name), value.strip()
    is_text = section_class is not None and typing.get_type_hints(section_class).get(key) in (str, str | None)
    if is_text and value not in ("", "~", "null") and value[0] not in "'\"":
        return name, key, value
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {text!r}: the value is not valid YAML") from None
    if isinstance(parsed, list):
        return name, key, [number_in(item) for item in parsed]
    return name, key, parsed if is_text else number_in(parsed)


def to_dict(config: Any) -> dict[str, dict[str, Any]]:
    """Nested plain Python values: what config.yaml and a checkpoint hold."""
    return json.loads(json.dumps(asdict(config)))


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(old: Any, new: Any) -> list[str]:
    """`section.key: old → new` for every field that differs."""
    before, after = to_dict(old), to_dict(new)
    changed = [(name, key) for name, part in before.items() for key in part if part[key] != after[name][key]]
    return [f"{name}.{key}: {before[name][key]} → {after[name][key]}" for name, key in changed]
