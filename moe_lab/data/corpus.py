"""Reading a source into documents, and splitting them into training and validation text."""

import codecs
import hashlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from moe_lab.config import ConfigError, DataConfig

# Near-copies and tables that would cross the split; third-party packages are not the library's own source.
NOT_IN_STDLIB = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "distutils", "ensurepip"}
NOT_IN_STDLIB |= {"encodings", "pydoc_data", "turtledemo"}
# Made when Python was built: they hold the paths of one machine, and the corpus hash would follow these.
BUILD_PRODUCTS = ("_sysconfigdata", "config-")
# Loaders of `datasets` for files; without `data_files` they take whatever lies in the working directory.
FILE_LOADERS = {"arrow", "csv", "hdf5", "json", "lance", "pandas", "parquet", "text", "vortex", "webdataset", "xml"}
ROWS = 256  # of a Parquet file at once


class Corpus(NamedTuple):
    train: list[str]
    validation: list[str]
    hash: str  # sha256 over names and bytes of all documents, hex
    n_documents: int
    n_bytes: int  # UTF-8 bytes of all documents
    skipped: dict[str, int]  # reason -> files (rows of a Hugging Face data set)


def read_corpus(data: DataConfig, progress: bool = True) -> Corpus:
    """Read `data.source`, at most `data.max_bytes` bytes of it, and split it. See `split` for the rule.

    Text is UTF-8 (a byte-order mark is dropped) and CRLF becomes LF. What is binary (holds a NUL byte), not UTF-8,
    unreadable, empty, or hidden in a folder is counted in `skipped`. Raises ConfigError, one line, if the source does
    not exist, cannot be read, or yields no text.
    """
    skipped: Counter[str] = Counter()
    documents: dict[str, str] = {}  # name -> text
    left = data.max_bytes or sys.maxsize
    for name, content in tqdm(contents_of(data, skipped), desc="reading", delay=2, leave=False, disable=not progress):
        text, reason = decode(content, left)
        if reason:
            skipped[reason] += 1
            continue
        if text:
            documents[name] = text
        left -= len(content)
        if left <= 0:
            break
    if not documents:
        found = f"data.source={data.source} yields no text{count_line(skipped)}"
        raise ConfigError(f"{found}; name a source that holds UTF-8 text")
    digest = hashlib.sha256()
    for name, content in (map(raw, item) for item in documents.items()):
        digest.update(f"{len(name)} {len(content)} ".encode() + name + content)
    train, validation = split(documents, by_text=data.source.startswith("hf:"))
    return Corpus(train, validation, digest.hexdigest(), len(documents), n_utf8(train + validation), dict(+skipped))


def contents_of(data: DataConfig, skipped: Counter[str]) -> Iterator[tuple[str, bytes | None]]:
    """Name (a relative path, or the number of a row) and bytes (None: unreadable) of each document, read as they are asked
    for; of a file, a byte more than `data.max_bytes`: a cut shows."""
    if data.source.startswith("hf:"):
        for row, text in enumerate(stream_texts(data)):
            yield f"{data.source}/{row}", text.encode()
        return
    folder, names = files_of(data.source, skipped)
    for name in names:
        path, content = folder / name, None
        if path.is_file():  # else a broken link, or a pipe, which would wait for ever
            with suppress(OSError), path.open("rb") as file:
                content = file.read(min(path.stat().st_size, (data.max_bytes or sys.maxsize) + 1))
        yield name, content


def decode(content: bytes | None, max_bytes: int) -> tuple[str, str | None]:
    """The first `max_bytes` bytes as text, whole characters only, and why there is none: "it is …"."""
    if content is None:
        return "", "unreadable"
    kept = content[:max_bytes]
    if not kept:
        return "", "empty"
    if b"\0" in kept:
        return "", "binary"
    try:  # where max_bytes cuts a document, a character may be cut too, and that is no fault of the document
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(kept, final=len(content) <= max_bytes)
    except UnicodeDecodeError:
        return "", "not UTF-8"
    return text.replace("\r\n", "\n"), None


def files_of(source: str, skipped: Counter[str]) -> tuple[Path, list[str]]:
    """A folder, and the relative paths in it of what the source has: of a user's folder, all that is not hidden."""
    if source == "stdlib":
        library = Path(sysconfig.get_paths()["stdlib"])
        return library, stdlib_names(library)
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise ConfigError(f"data.source={source}: no such file or folder; write stdlib, a path, or hf:NAME")
    names = file_names(path)
    visible = [name for name in names if not name.startswith(".") and "/." not in name]
    skipped["hidden"] = len(names) - len(visible)
    return path, visible


def stdlib_names(root: Path) -> list[str]:
    """The standard library's own .py files: no tests, near-copies, tables or products of the build."""
    found = file_names(root, NOT_IN_STDLIB)
    return [name for name in found if name.endswith(".py") and not name.startswith(BUILD_PRODUCTS)]


def file_names(root: Path, without: Collection[str] = ()) -> list[str]:
    """Relative paths of all files below `root`, sorted; links to folders, and folders of these names, are not followed."""

    def stop(error: OSError):
        raise ConfigError(f"data.source: the folder {error.filename} cannot be read: {error.strerror}")

    found = []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = (name for name in folders if name not in without)  # what is left there is walked next
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
    return sorted(found)


def stream_texts(data: DataConfig, rows: Iterable[dict] | None = None) -> Iterator[str]:
    """The texts of the `train` split, or of these rows of it, as they arrive; "" where a row has none. Raises ConfigError,
    whatever the library stumbles over."""
    with reading(data):
        for row in open_source(data)[0] if rows is None else rows:
            field = f"data.text_field={data.text_field}"
            if data.text_field not in row:
                raise ConfigError(f"{field} is no column of {data.source}; it has {', '.join(map(str, row))}")
            text = row[data.text_field]
            if not isinstance(text, str | None):
                raise ConfigError(f"{field} of {data.source} holds {type(text).__name__}, not text")
            yield text or ""


def open_source(data: DataConfig) -> tuple[Iterable[dict], str]:
    """The `train` split of a Hugging Face data set, not read yet, and what tells this content from another."""
    try:
        import datasets
    except ImportError:
        how = 'pip install "moe-lab[online]"'
        raise ConfigError(f"data.source={data.source} needs the package `datasets`: {how}") from None
    name = data.source.removeprefix("hf:")
    if name in FILE_LOADERS and not data.data_files:
        raise ConfigError(f"data.source={data.source} needs data.data_files, such as data_files=data/*.{name}")
    with reading(data):
        builder = datasets.load_dataset_builder(name, data.subset, data_files=data.data_files)
        if type(builder).__name__ == "Parquet":
            files = list(builder.config.data_files["train"])
            if not files:
                raise FileNotFoundError(data.data_files)
            rows = datasets.IterableDataset.from_generator(parquet_rows, gen_kwargs={"files": files})
        else:
            rows = builder.as_streaming_dataset(split="train")
        return rows, f"{name} {builder.config_id} {builder.hash}"


def parquet_rows(files: list[str]) -> Iterator[dict]:
    """As the library's own stream; but that lets Arrow read ahead without a bound where one is slower than the disk."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    for path in files:
        with fsspec.open(path) as file:
            for batch in ParquetFile(file).iter_batches(batch_size=ROWS):
                yield from batch.to_pylist()


@contextmanager
def reading(data: DataConfig) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # hub, network and file formats raise their own kinds, and all are about the source
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        todo = "check the name, data.subset, data.data_files and the network, or give your own text: data.source=FOLDER"
        raise ConfigError(f"data.source={data.source} cannot be read ({reason}); {todo}") from error


def split(documents: dict[str, str], by_text: bool) -> tuple[list[str], list[str]]:
    """Training and validation text of {name: text}. A document is validation if sha256 of its name (`by_text`: of its
    text), read as a number, is 0 modulo 20. Where that would be less than 2 % or more than 20 % of the bytes, the last
    5 % of every document (cut at a line end, if one is at most 2.5 % away) is validation instead."""
    train: list[str] = []
    validation: list[str] = []
    for name, text in documents.items():
        (validation if is_validation(text if by_text else name) else train).append(text)
    if 0.02 <= n_utf8(validation) / (n_utf8(train) + n_utf8(validation)) <= 0.20:
        return train, validation
    train, validation = [], []
    for text in documents.values():
        cut = len(text) - len(text) // 20
        cut = text.find("\n", cut - len(text) // 40, cut + len(text) // 40) + 1 or cut  # at a line end nearby
        train.append(text[:cut])
        validation += [text[cut:]] if text[cut:] else []
    return train, validation


def is_validation(identity: str) -> bool:
    return int(hashlib.sha256(raw(identity)).hexdigest(), 16) % 20 == 0


def raw(text: str) -> bytes:
    return text.encode(errors="surrogateescape")  # a file name on Linux may hold bytes that are no UTF-8


def n_utf8(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def count_line(skipped: dict[str, int]) -> str:
    """`; skipped 2 binary, 1 empty`, or nothing."""
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items()) if n)
    return f"; skipped {reasons}" if reasons else ""
