import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from test_data_prepare import TOKENS, documents, words

from moe_lab.config import ConfigError, DataConfig, ModelConfig
from moe_lab.data import Batches, Dataset, prepare, stream
from moe_lab.data.corpus import is_validation, reading

MODEL = ModelConfig(vocab_size=300, max_seq_len=16)
SMALL = {"SAMPLE": 2000, "SAVED_EVERY": 3000}  # bytes
TEXTS = [f"{i} {words(40, seed=i)}" for i in range(200)]


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two hundred documents and an empty row, in row groups of thirty; small amounts are streamed."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": [*TEXTS, ""]}), tmp_path / "rows.parquet", row_group_size=30)
    for name, value in SMALL.items():
        monkeypatch.setattr(stream, name, value)
    monkeypatch.setattr(importlib.import_module("moe_lab.data.prepare"), "IN_MEMORY", 0)
    return tmp_path


def get(folder: Path, **changes) -> Dataset:
    given = {"source": "hf:parquet", "data_files": str(folder / "*.parquet"), "max_bytes": 10**6} | changes
    return prepare(DataConfig(**given), MODEL, cache_dir=folder / "cache", progress=False)


def test_every_document_stands_once_in_the_split_that_its_hash_says(parquet: Path) -> None:
    dataset = get(parquet)
    train, validation = documents(dataset, dataset.train), documents(dataset, dataset.validation)
    assert train == [text for text in TEXTS if not is_validation(text)]
    assert validation == [text for text in TEXTS if is_validation(text)] and validation
    assert isinstance(dataset.train, np.memmap) and not dataset.train.flags.writeable
    first = dataset.tokenizer.decode([int(dataset.validation[0])])
    assert dataset.validation_bytes == len("".join(validation).encode()) - len(first.encode())
    assert "200 documents" in dataset.was_read and "skipped 1 empty" in dataset.was_read
    assert f"{sum(len(text.encode()) for text in TEXTS):,} bytes" in dataset.was_read


def test_the_tokenizer_is_that_of_the_first_training_texts(parquet: Path) -> None:
    sample, n = [], 0
    for text in TEXTS:
        if not is_validation(text) and n < SMALL["SAMPLE"]:
            sample.append(text)
            n += len(text.encode())
    expected = TOKENS.train_tokenizer(sample, 300, progress=False)
    assert get(parquet).tokenizer.get_vocab() == expected.get_vocab()


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_stopped_stream_goes_on_and_ends_in_the_same_files(parquet: Path, monkeypatch, stopped: int) -> None:
    whole = get(parquet)
    files = {
        name: (whole.folder / name).read_bytes()
        for name in ("train.npy", "validation.npy", "tokenizer.json", "meta.json")
    }
    again = parquet / "again"
    again.mkdir()
    os.link(parquet / "rows.parquet", again / "rows.parquet")
    save, n = stream.save_state, 0

    def stop(*args):
        nonlocal n
        save(*args)
        n += 1
        if n == stopped + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(stream, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            get(again)
    (part,) = (again / "cache" / "data").glob("*.part")
    state = json.loads((part / "stream.json").read_text())
    assert 0 < state["train"] < len(whole.train)
    with (part / "train.npy").open("ab") as file:
        file.write(b"what came after the last save")
    with monkeypatch.context() as seen:
        seen.setattr(stream, "begin", lambda *args: pytest.fail("it began anew"))
        resumed = get(again)
    assert {name: (resumed.folder / name).read_bytes() for name in files} == files
    assert resumed.corpus_hash == whole.corpus_hash


def test_the_second_time_nothing_is_read(parquet: Path, monkeypatch) -> None:
    first = get(parquet)
    monkeypatch.setattr(stream, "stream_texts", lambda *args: pytest.fail("the text was read again"))
    second = get(parquet)
    assert second.describe() == first.describe() and second.folder == first.folder
    monkeypatch.undo()
    os.utime(parquet / "rows.parquet", (1, 1))  # another file, as far as one can tell without reading it
    assert get(parquet, max_bytes=10**8).folder != first.folder


def test_no_more_than_what_is_asked_for(parquet: Path) -> None:
    dataset = get(parquet, max_bytes=5000)
    texts = documents(dataset, dataset.train) + documents(dataset, dataset.validation)
    assert sum(len(text.encode()) for text in texts) in range(4996, 5001) and texts[0] == TEXTS[0]


def test_validation_text_is_bounded(parquet: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream, "VALIDATION", 300)
    dataset = get(parquet)
    kept, share = documents(dataset, dataset.validation), [text for text in TEXTS if is_validation(text)]
    assert kept == share[: len(kept)] and 0 < len(kept) < len(share)
    assert f"{len(share) - len(kept)} beyond the validation text" in dataset.was_read


def test_a_source_within_the_sample_is_read_at_once(parquet: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream, "SAMPLE", 10**6)
    dataset = get(parquet)
    assert len(documents(dataset, dataset.train)) + len(documents(dataset, dataset.validation)) == len(TEXTS)


def test_a_disk_that_is_too_small(parquet: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with refused(
        ConfigError,
        match=r"data.max_bytes: 1,000,000 bytes of hf:parquet are about .* and 100 are free at .*; lower it, or make room$",
    ):
        get(parquet)
    assert not list((parquet / "cache" / "data").glob("*.part"))


def test_an_error_midway_is_one_line_and_what_was_written_stays(parquet: Path, monkeypatch) -> None:
    texts = stream.stream_texts

    def breaks(data, rows):
        for i, text in enumerate(texts(data, rows)):
            if i == 120:
                with reading(data):
                    raise ConnectionError("the hub went\naway")
            yield text

    with monkeypatch.context() as broken:
        broken.setattr(stream, "stream_texts", breaks)
        with refused(
            ConfigError, match=r"data.source=hf:parquet cannot be read \(ConnectionError: the hub went away\); check"
        ):
            get(parquet)
    dataset = get(parquet)
    assert len(documents(dataset, dataset.train)) > 150


def test_batches_of_a_large_stream_are_bounded(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(10**6, dtype=np.uint32))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    batches = Batches(tokens, seq_len=4, batch_size=3, seed=0)
    assert batches.order.nbytes == 4 * len(batches.windows)
    assert (batches.next_batch().diff() == 1).all()


MEMORY = """
import re, sys
from pathlib import Path
import datasets, pyarrow.parquet, torch
from moe_lab.config import DataConfig, ModelConfig
from moe_lab.data import Batches, prepare
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
data = DataConfig(source="hf:parquet", data_files=sys.argv[1], max_bytes=10**9)
dataset = prepare(data, ModelConfig(vocab_size=50257, max_seq_len=256), cache_dir=Path(sys.argv[2]), progress=False)
print(dataset.vocab_size, len(dataset.train), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no peak of a process that does not begin with its parent's")
@pytest.mark.timeout(900)  # a minute on an idle machine
def test_200_mb_within_300(tmp_path: Path) -> None:
    """A file of 200 MB in one row group, of the library's own words: of all of them at first, for the vocabulary, then of few
    long ones, which are encoded faster. Memory is what the process takes beyond its imports."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(Path(os.__file__).parent.rglob("[a-t]*.py"))  # tests included: many words
    library = " ".join(path.read_text("utf-8", errors="ignore") for path in files if path.is_file()).split()
    few = [word for word in library if word.isalpha() and len(word) > 7][:20_000]
    choose, texts, size = np.random.default_rng(0), [], 0
    while size < 2e8:
        words = library if size < 4e7 else few
        place = choose.integers(0, len(words) - 400)
        texts.append(" ".join(words[place : place + 400]))
        size += len(texts[-1])
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "rows.parquet"), str(tmp_path / "cache")]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    vocab_size, n_tokens, memory = map(int, out)
    print(f"{n_tokens:,} tokens within {memory:,} bytes")
    assert vocab_size == 50257 and n_tokens > 2e7 and 1e7 < memory < 3e8
