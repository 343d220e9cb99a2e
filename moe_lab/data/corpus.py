"""Reading a source into documents, and splitting them into training and validation text."""

from __future__ import annotations

import codecs
import hashlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from moe_lab.config import ConfigError, DataConfig
from moe_lab.data.hugging_face import stream_texts

# Near-copies and tables that would cross the split; third-party packages are not the library's own source.
NOT_IN_STDLIB = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "distutils", "ensurepip"}
NOT_IN_STDLIB |= {"encodings", "pydoc_data", "turtledemo"}
# Made when Python was built: they hold the paths of one machine, and the corpus hash would follow these.
BUILD_PRODUCTS = ("_sysconfigdata", "config-")


class Document(NamedTuple):
    name: str  # path relative to the source, with forward slashes
    text: str
    split_key: str  # what the split rule hashes


class Corpus(NamedTuple):
    train: list[str]
    validation: list[str]
    hash: str  # sha256 over names and bytes of all documents, hex
    n_documents: int
    n_bytes: int  # UTF-8 bytes of all documents
    skipped: dict[str, int]  # reason -> files (rows of a Hugging Face data set)


def read_corpus(data: DataConfig, progress: bool = True) -> Corpus:
    """Read `data.source`, at most `data.max_bytes` bytes of it, and split it. See `split` for the rule.

    Files are UTF-8 (a byte-order mark is dropped) and CRLF becomes LF. Inside a folder, files that are binary (hold
    a NUL byte), not UTF-8, unreadable, empty or hidden are skipped and counted in `skipped`.
    Raises ConfigError, one line, if the source does not exist, cannot be read, or yields no text.
    """
    skipped: Counter[str] = Counter()
    if data.source.startswith("hf:"):
        texts = stream_texts(data, skipped, progress)
        documents = [Document(f"{data.source}/{index}", text, split_key=text) for index, text in enumerate(texts)]
    elif data.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        documents = list(read_files(root, stdlib_names(root), data.max_bytes, skipped))
    else:
        documents = read_path(data, skipped)
    if not documents:
        reasons = f" ({count_line(skipped)})" if skipped else ""
        raise ConfigError(f"data.source={data.source} yields no text{reasons}; name a source that holds UTF-8 text")
    digest = hashlib.sha256()
    for document in documents:
        name, content = raw(document.name), document.text.encode()
        digest.update(f"{len(name)} {len(content)} ".encode() + name + content)
    train, validation = split(documents)
    n_bytes = n_utf8(train) + n_utf8(validation)
    return Corpus(train, validation, digest.hexdigest(), len(documents), n_bytes, dict(skipped))


def split(documents: list[Document]) -> tuple[list[str], list[str]]:
    """Training and validation text.

    A document is validation if sha256 of its relative path (for a Hugging Face data set: of its text), read as a
    number, is 0 modulo 20. Few documents may give a lopsided split: where validation would hold less than 2 % or
    more than 20 % of the bytes, the last 5 % of every document is validation instead, cut at a line end if one is
    near, and both parts count as documents.
    """
    train: list[str] = []
    validation: list[str] = []
    for document in documents:
        is_held_out = int(hashlib.sha256(raw(document.split_key)).hexdigest(), 16) % 20 == 0
        (validation if is_held_out else train).append(document.text)
    if 0.02 <= n_utf8(validation) / (n_utf8(train) + n_utf8(validation)) <= 0.20:
        return train, validation
    parts = [cut_near_end(document.text) for document in documents]
    return [head for head, _ in parts], [tail for _, tail in parts if tail]


def cut_near_end(text: str) -> tuple[str, str]:
    """`text` in two, cut before the last 5 % or at a line end that is at most 2.5 % away from there."""
    cut = len(text) - len(text) // 20
    cut = text.find("\n", cut - len(text) // 40, cut + len(text) // 40) + 1 or cut
    return text[:cut], text[cut:]


def raw(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # a file name on Linux may hold bytes that are no UTF-8


def n_utf8(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def count_line(skipped: dict[str, int]) -> str:
    """`skipped 2 binary, 1 empty`."""
    return "skipped " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items()))


def stdlib_names(root: Path) -> list[str]:
    """The standard library's own .py files: no tests, near-copies, tables or products of the build."""
    paths = [PurePosixPath(name) for name in file_names(root) if name.endswith(".py")]
    paths = [path for path in paths if not path.parts[0].startswith(BUILD_PRODUCTS)]
    return [str(path) for path in paths if not NOT_IN_STDLIB.intersection(path.parts[:-1])]


def read_path(data: DataConfig, skipped: Counter[str]) -> list[Document]:
    """The user's file, or every file below the user's folder; hidden files and folders are left out."""
    path = Path(data.source).expanduser()
    if path.is_file():
        documents = list(read_files(path.parent, [path.name], data.max_bytes, skipped))
        if skipped:
            raise ConfigError(f"data.source={data.source} is {next(iter(skipped))}; name a file that holds UTF-8 text")
        return documents
    if not path.is_dir():
        raise ConfigError(f"data.source={data.source}: no such file or folder; write stdlib, a path, or hf:NAME")
    names = file_names(path)
    if not names:
        raise ConfigError(f"data.source={data.source} is a folder without files; put UTF-8 text files into it")
    visible = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if len(names) > len(visible):
        skipped["hidden"] = len(names) - len(visible)
    return list(read_files(path, visible, data.max_bytes, skipped))


def file_names(root: Path) -> list[str]:
    """Relative paths of all files below `root`, sorted; links to folders are not followed."""

    def stop(error: OSError):
        raise ConfigError(f"data.source: the folder {error.filename} cannot be read: {error.strerror}")

    found = os.walk(root, onerror=stop)
    return sorted((Path(folder) / name).relative_to(root).as_posix() for folder, _, names in found for name in names)


def read_files(root: Path, names: Iterable[str], max_bytes: int | None, skipped: Counter[str]) -> Iterator[Document]:
    """The files that hold text, in order, until `max_bytes` bytes are read; the last one may be cut."""
    left = max_bytes or sys.maxsize
    for name in names:
        text, reason = read_text(root / name, left)
        if reason:
            skipped[reason] += 1
            continue
        if text:
            yield Document(name, text.replace("\r\n", "\n"), split_key=name)
        left -= (root / name).stat().st_size  # not the text's size: a file that was cut must be the last one
        if left <= 0:
            return


def read_text(path: Path, max_bytes: int) -> tuple[str, str | None]:
    """At most `max_bytes` bytes of a file as text, whole characters only, and why there is none: "the file is …"."""
    if not path.is_file():
        return "", "unreadable"  # a broken link, or a pipe, which would wait for ever
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(min(size, max_bytes))
    except OSError:
        return "", "unreadable"
    if not content:
        return "", "empty"
    if b"\0" in content:
        return "", "binary"
    try:  # where max_bytes cuts the file, a character may be cut too, and that is no fault of the file
        return codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=size <= max_bytes), None
    except UnicodeDecodeError:
        return "", "not UTF-8"
