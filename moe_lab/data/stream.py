"""A Hugging Face data set that need not fit in memory: tokens are written as the text arrives, and a stop loses little.

Each split is one file that grows, not a row of shards: a memory map of it is one array, as of a small corpus.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer
from tqdm import tqdm

from moe_lab.config import ConfigError, DataConfig
from moe_lab.data.corpus import decode, is_validation, open_source, raw, stream_texts
from moe_lab.data.tokens import encode, token_dtype, train_tokenizer, write_meta

IN_MEMORY = 1 << 26  # bytes: a data set of which more is asked for is streamed
SAMPLE = 1 << 24  # bytes of training text that the tokenizer learns from: the first ones
SAVED_EVERY = 1 << 23  # bytes of text between two saves; what is in memory at once is a few times that
VALIDATION = 1 << 24  # bytes of validation text after which documents of that share are left out


@dataclass
class State:
    """How far a stream has come; saved beside its files."""

    place: dict | None = None  # where the data set goes on
    n_documents: int = 0
    n_bytes: int = 0  # UTF-8 bytes of all documents
    n_read: int = 0  # of the source, what is skipped included
    hash: str = ""  # sha256 over the last save's and the documents since, hex
    train: int = 0  # tokens written
    validation: int = 0
    validation_text: int = 0  # bytes
    skipped: Counter[str] = field(default_factory=Counter)


def stream(data: DataConfig, vocab_size: int, key: str, folder: Path, progress: bool) -> State | None:
    """The tokens of `data.source` in `folder / key`, made or completed; None if the source ends within the sample.
    `folder / f"{key}.part"` holds what an interrupted call has written. Raises ConfigError: the source cannot be read,
    or the disk is too small."""
    whole, draft = folder / key, folder / f"{key}.part"
    draft.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        if not whole.exists():
            rows, _ = open_source(data)
            if not (draft / "stream.json").exists():
                shutil.rmtree(draft, ignore_errors=True)  # it had no tokenizer yet
                texts = sample(data, rows)
                if texts is None:
                    return None
                begin(draft, data, texts, vocab_size, progress)
                rows, _ = open_source(data)
            go_on(draft, data, rows, progress)
            draft.rename(whole)
    return load_state(whole)


def sample(data: DataConfig, rows: Sequence[dict]) -> list[str] | None:
    """The first SAMPLE bytes of training text, in documents."""
    texts, n = [], 0
    for text in stream_texts(data, rows):
        if not is_validation(text):
            texts.append(text)
            n += len(text.encode())
        if n >= SAMPLE:
            return texts


def begin(draft: Path, data: DataConfig, texts: list[str], vocab_size: int, progress: bool) -> None:
    """A tokenizer and empty files, where the disk has room for what will come."""
    tokenizer = train_tokenizer(texts, vocab_size, progress)
    part, dtype = texts[: len(texts) // 16 + 1], token_dtype(tokenizer)
    per_byte = len(encode(tokenizer, part, progress=False)) / sum(len(text.encode()) for text in part)
    needed = int(data.max_bytes * per_byte * dtype.itemsize)
    free = shutil.disk_usage(draft.parent).free
    size = f"{data.max_bytes:,} bytes of {data.source} are about {data.max_bytes * per_byte:,.0f} tokens, {needed:,} bytes on disk"
    if needed > free:
        raise ConfigError(f"data.max_bytes: {size}, and {free:,} are free at {draft.parent}; lower it, or make room")
    if progress:
        print(f"{size}; {free:,} are free")
    draft.mkdir()
    tokenizer.save(str(draft / "tokenizer.json"))
    for name in ("train", "validation"):
        np.save(draft / f"{name}.npy", np.array([], dtype=dtype))
    save_state(draft, State())


def go_on(draft: Path, data: DataConfig, rows: Sequence[dict], progress: bool) -> None:
    """Write the tokens of what has not been read yet, saving now and then."""
    tokenizer = Tokenizer.from_file(str(draft / "tokenizer.json"))
    state = load_state(draft)
    tokenizer.encode_special_tokens = True
    if state.place:
        rows.load_state_dict(state.place)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(draft / f"{name}.npy", "r+b")) for name in ("train", "validation")}
        for name, file in files.items():
            set_length(file, getattr(state, name), token_dtype(tokenizer))
        counted = {"total": data.max_bytes, "initial": state.n_read, "unit": "B", "unit_scale": True}
        bar = stack.enter_context(tqdm(desc="tokenizing", delay=2, disable=not progress, **counted))
        for documents in portions(data, rows, state, bar):
            for name, file in files.items():
                ids = encode(tokenizer, documents[name], progress=False)
                file.write(ids.tobytes())
                setattr(state, name, getattr(state, name) + len(ids))
                set_length(file, getattr(state, name), ids.dtype)
            state.place = rows.state_dict()
            save_state(draft, state)
    write_meta(draft, tokenizer, np.load(draft / "validation.npy", mmap_mode="r"))


def portions(data: DataConfig, rows: Sequence[dict], state: State, bar: tqdm) -> Iterator[dict[str, list[str]]]:
    """About SAVED_EVERY bytes of documents at a time, by split; `state` has counted them."""
    documents, held = {"train": [], "validation": []}, 0
    for text in stream_texts(data, rows):
        content, left = raw(text), data.max_bytes - state.n_read
        if left <= 0:
            break
        text, reason = decode(content, left)
        name = "validation" if is_validation(text) else "train"
        if not reason and name == "validation" and state.validation_text > VALIDATION:
            reason = "beyond the validation text that is kept"
        state.n_read += min(len(content), left)
        bar.update(min(len(content), left))
        if reason:
            state.skipped[reason] += 1
            continue
        n = len(raw(text))
        documents[name].append(text)
        state.hash = hashlib.sha256(f"{state.hash} {n} ".encode() + raw(text)).hexdigest()
        state.n_documents = state.n_documents + 1
        state.n_bytes = state.n_bytes + n
        held = held + n
        state.validation_text += n if name == "validation" else 0
        if held >= SAVED_EVERY:
            yield documents
            documents, held = {"train": [], "validation": []}, 0
    yield documents


def set_length(file: BinaryIO, n: int, dtype: np.dtype) -> None:
    """Make of a .npy file that grows one of `n` tokens, on disk, and stand at its end."""
    file.flush()
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_1_0(file, header)
    file.truncate(file.tell() + n * dtype.itemsize)  # the header leaves room for the count to grow
    file.seek(0, os.SEEK_END)
    os.fsync(file.fileno())


def load_state(folder: Path) -> State:
    values = json.loads((folder / "stream.json").read_text())
    return State(**values | {"skipped": Counter(values["skipped"])})


def save_state(folder: Path, state: State) -> None:
    path = folder / "stream.json.new"
    path.write_text(json.dumps(vars(state)))
    path.replace(folder / "stream.json")
