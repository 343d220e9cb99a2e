import importlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from tokenizers import Tokenizer

from moe_lab.config import ConfigError, DataConfig, ModelConfig
from moe_lab.data import Dataset, prepare

MODULE = importlib.import_module("moe_lab.data.prepare")  # the package gives the function the same name
TOKENS = importlib.import_module("moe_lab.data.tokens")
MODEL = ModelConfig(vocab_size=300, max_seq_len=16)
WEIRD = [
    "emoji 🙂👩‍👩‍👧 and CRLF\r\n\r\n\ttabs  spaces   \r",
    "".join(map(chr, range(256))) + "\ufeff\ufffd\u2028\U0010ffff",
    f"a text that spells {TOKENS.END_OF_TEXT} out",
    "नमस्ते 你好 مرحبا e\u0301",
    "",
]


def words(n: int, seed: int = 0) -> str:
    """Lines of made-up words, `n` of them."""
    choose = random.Random(seed)
    vocabulary = ["".join(choose.choices("abcdeäö", k=choose.randint(1, 8))) for _ in range(60)]
    return "".join(choose.choice(vocabulary) + choose.choice("   \n") for _ in range(n))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty documents, some of them odd."""
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_bytes(
            (words(40, seed=i) + (WEIRD[i] if i in (0, 2, 3) else "")).encode()
        )
    return tmp_path / "text"


def get(folder: Path, model: ModelConfig = MODEL, **data) -> Dataset:
    return prepare(DataConfig(source=str(folder), **data), model, cache_dir=folder.parent / "cache")


def documents(dataset: Dataset, stream: np.ndarray) -> list[str]:
    """The texts between the end-of-text tokens of a stream."""
    assert stream[-1] == TOKENS.END_OF_TEXT_ID
    parts = np.split(stream, np.flatnonzero(stream == TOKENS.END_OF_TEXT_ID) + 1)[:-1]
    return [dataset.tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def test_the_streams_hold_every_document_whole(folder: Path) -> None:
    dataset = get(folder)
    texts = [path.read_bytes().decode().replace("\r\n", "\n") for path in sorted(folder.iterdir())]
    train, validation = documents(dataset, dataset.train), documents(dataset, dataset.validation)
    assert sorted(train + validation) == sorted(texts) and len(train) > len(validation) > 0
    assert dataset.train.dtype == dataset.validation.dtype == np.uint16 and dataset.train.ndim == 1
    assert not dataset.train.flags.writeable and isinstance(dataset.train, np.memmap)
    assert dataset.vocab_size == 300 == dataset.tokenizer.get_vocab_size() > dataset.train.max()


@pytest.mark.parametrize("text", WEIRD)
def test_any_text_comes_back(folder: Path, text: str) -> None:
    for tokenizer in (get(folder).tokenizer, Tokenizer.from_file(str(get(folder).folder / "tokenizer.json"))):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert TOKENS.END_OF_TEXT_ID not in get(folder).tokenizer.encode(text).ids  # only the end of a document is one


def test_the_tokenizer_sees_training_text_only(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(words(4000) + "\n" + "zyxw " * 120)  # the last 5 % hold a word of their own
    dataset = get(tmp_path / "text.txt", ModelConfig(vocab_size=500, max_seq_len=16))
    assert "zyxw" in documents(dataset, dataset.validation)[0]
    assert not [token for token in dataset.tokenizer.get_vocab() if "zy" in token]


def test_validation_bytes_are_those_of_the_targets(folder: Path) -> None:
    dataset = get(folder)
    first = dataset.tokenizer.decode([int(dataset.validation[0])])
    assert "\ufffd" not in first  # the token holds whole characters
    texts = documents(dataset, dataset.validation)
    assert dataset.validation_bytes == len("".join(texts).encode()) - len(first.encode())


def test_long_texts_are_encoded_in_pieces(folder: Path, monkeypatch) -> None:
    whole = documents(dataset := get(folder), dataset.train)
    monkeypatch.setattr(TOKENS, "PIECE", 50)
    pieces = TOKENS.encode(dataset.tokenizer, whole, progress=False)
    assert documents(dataset, pieces) == whole and len(pieces) > len(dataset.train)


def test_a_small_text_yields_a_smaller_vocabulary_and_a_large_one_needs_32_bits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 40)
    dataset = get(tmp_path / "text.txt", ModelConfig(vocab_size=4096, max_seq_len=16))
    assert 257 < dataset.vocab_size == dataset.tokenizer.get_vocab_size() < 300
    dataset.tokenizer.add_tokens([f"<{i}>" for i in range(2**16 + 1 - dataset.vocab_size)])
    assert TOKENS.encode(dataset.tokenizer, ["<5>"], progress=False).dtype == np.uint32


def test_the_second_time_nothing_is_made_again_unless_something_changed(folder: Path) -> None:
    first = get(folder)
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = get(folder)
    assert {path.name: path.stat().st_mtime_ns for path in second.folder.iterdir()} == before
    assert first.corpus_hash == second.corpus_hash and (first.train == second.train).all()
    assert first.describe() == second.describe()
    assert get(folder, ModelConfig(vocab_size=280, max_seq_len=16)).folder != first.folder
    (folder / "7.txt").write_text("another text")
    changed = get(folder)
    assert changed.folder != first.folder and changed.corpus_hash != first.corpus_hash


def test_two_processes_at_once(folder: Path, monkeypatch) -> None:
    train_tokenizer, faster = MODULE.train_tokenizer, []

    def while_another_finishes(*args):
        monkeypatch.setattr(MODULE, "train_tokenizer", train_tokenizer)
        faster.append(get(folder))
        return train_tokenizer(*args)

    monkeypatch.setattr(MODULE, "train_tokenizer", while_another_finishes)
    slower = get(folder)
    assert (slower.train == faster[0].train).all() and slower.folder == faster[0].folder
    assert os.listdir(slower.folder.parent) == [slower.folder.name]  # no draft is left


def test_a_failure_leaves_nothing_behind(folder: Path, monkeypatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(MODULE, "encode", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            get(folder)
    assert os.listdir(folder.parent / "cache" / "data") == []
    get(folder)


@pytest.mark.parametrize("name", ["train.npy", "tokenizer.json", "meta.json"])
def test_a_damaged_cache_says_what_to_delete(folder: Path, name: str) -> None:
    path = get(folder).folder
    (path / name).write_bytes(b"{")
    with refused(ConfigError, match="is damaged .*; delete it, and run again$") as caught:
        get(folder)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seq_len", "counts"),
    [
        ("a few words and then a few more of them.", 64, r"\d+ training tokens .* and 3 validation tokens"),
        ("nineteen characters", 4, r"\d+ training tokens .* and 0 validation tokens"),
    ],
)
def test_too_little_text(tmp_path: Path, text: str, seq_len: int, counts: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(text)
    with refused(ConfigError, match=rf"{counts} .*; give more text, raise data.max_bytes or lower") as caught:
        get(path, ModelConfig(max_seq_len=seq_len))
    assert str(caught.value).startswith(f"data.source={path} is too little text: ")


def test_describe_tells_counts_and_skips(folder: Path) -> None:
    (folder / "bad.bin").write_bytes(b"\0")
    dataset = get(folder)
    text = dataset.describe()
    assert "60 documents" in text and "; skipped 1 binary" in text
    assert f"{len(dataset.train):,} training" in text and len(text.splitlines()) == 2


def test_cache_lies_in_the_repository() -> None:
    assert Path(__file__).parents[1] / ".cache" == MODULE.CACHE
