"""Reading a Hugging Face data set as a stream of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from moe_lab.config import ConfigError, DataConfig

# Loaders of `datasets` for files; without `data_files` they take whatever lies in the working directory.
FILE_LOADERS = {"arrow", "csv", "hdf5", "json", "lance", "pandas", "parquet", "text", "vortex", "webdataset", "xml"}


def stream_texts(data: DataConfig, skipped: Counter[str], progress: bool) -> Iterator[str]:
    """Texts of the `train` split until `data.max_bytes` UTF-8 bytes are read; the last one may be cut.

    Rows without text are counted in `skipped`. Raises ConfigError, one line, whatever the library stumbles over.
    """
    left = data.max_bytes
    with tqdm(total=left, desc="reading", unit="B", unit_scale=True, delay=2, disable=not progress) as bar:
        for row in rows(data):
            content = text_of(row, data).encode()
            if not content:
                skipped["empty"] += 1
                continue
            text = content[:left].decode(errors="ignore")  # "ignore" drops at most a character that the cut halved
            if text:
                yield text
            bar.update(min(len(content), left))
            left -= len(content)
            if left <= 0:
                return


def rows(data: DataConfig) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError:
        message = f'data.source={data.source} needs the package `datasets`: pip install "moe-lab[online]"'
        raise ConfigError(message) from None
    name = data.source.removeprefix("hf:")
    if not name:
        raise ConfigError("data.source=hf: names no data set; write hf:NAME, such as hf:HuggingFaceFW/fineweb-edu")
    if name in FILE_LOADERS and not data.data_files:
        raise ConfigError(f"data.source={data.source} needs data.data_files, such as data_files=data/*.{name}")
    try:
        yield from datasets.load_dataset(name, data.subset, data_files=data.data_files, split="train", streaming=True)
    except Exception as error:  # hub, network and file formats raise their own kinds, and all are about the source
        reason = " ".join(str(error).split())[:300]
        message = f"data.source={data.source} cannot be read ({type(error).__name__}: {reason})"
        raise ConfigError(f"{message}; check the name, data.subset, data.data_files and the network") from error


def text_of(row: dict[str, Any], data: DataConfig) -> str:
    """The row's text; a missing value is no text."""
    if data.text_field not in row:
        columns = ", ".join(map(str, row))
        raise ConfigError(f"data.text_field={data.text_field} is no column of {data.source}; it has {columns}")
    text = row[data.text_field]
    if not isinstance(text, str | None):
        raise ConfigError(f"data.text_field={data.text_field} of {data.source} holds {type(text).__name__}, not text")
    return text or ""
