"""Reading a Hugging Face data set as a stream of texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_lab.config import ConfigError, DataConfig

# Loaders of `datasets` for files; without `data_files` they take whatever lies in the working directory.
FILE_LOADERS = {"arrow", "csv", "hdf5", "json", "lance", "pandas", "parquet", "text", "vortex", "webdataset", "xml"}


def stream_texts(data: DataConfig) -> Iterator[str]:
    """The texts of the `train` split, "" where a row has none. Raises ConfigError, whatever the library stumbles over."""
    for row in rows(data):
        if data.text_field not in row:
            columns = ", ".join(map(str, row))
            raise ConfigError(f"data.text_field={data.text_field} is no column of {data.source}; it has {columns}")
        text = row[data.text_field]
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise ConfigError(f"data.text_field={data.text_field} of {data.source} holds {kind}, not text")
        yield text or ""


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
