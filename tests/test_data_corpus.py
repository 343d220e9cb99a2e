import hashlib
import os
import sys
from pathlib import Path

import pytest
from helpers import refused

from moe_lab.config import ConfigError, DataConfig
from moe_lab.data.corpus import read_corpus, stdlib_names


def is_validation(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest(), "big") % 20 == 0


def write(folder: Path, **files: str | bytes) -> DataConfig:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataConfig(source=str(folder))


def message_of(data: DataConfig) -> str:
    with refused(ConfigError, r"^data\.") as caught:
        read_corpus(data)
    return str(caught.value)


def test_a_document_is_validation_by_the_hash_of_its_path(tmp_path: Path) -> None:
    names = [f"deep/{i}/text.txt" for i in range(200)]
    corpus = read_corpus(write(tmp_path, **{name: f"this is {name}, some text" for name in names}))
    held_out = [f"this is {name}, some text" for name in sorted(names) if is_validation(name)]
    assert 3 < len(held_out) < 40 and corpus.validation == held_out
    assert corpus.train == [f"this is {name}, some text" for name in sorted(names) if not is_validation(name)]
    assert corpus.n_documents == 200 and corpus.skipped == {}


def test_few_documents_give_their_last_twentieth(tmp_path: Path) -> None:
    lines = "".join(f"line {i}\n" for i in range(1000))
    corpus = read_corpus(write(tmp_path, **{"a.txt": lines.replace("\n", "\r\n"), "b.txt": "x" * 1000}))
    assert [a + b for a, b in zip(corpus.train, corpus.validation, strict=True)] == [lines, "x" * 1000]
    assert corpus.validation[0].startswith("line ") and 0.025 < len(corpus.validation[0]) / len(lines) < 0.075
    assert corpus.validation[1] == "x" * 50
    one_file = read_corpus(DataConfig(source=str(tmp_path / "a.txt")))
    assert one_file.train + one_file.validation == [corpus.train[0], corpus.validation[0]]
    assert one_file.n_documents == 1 and one_file.n_bytes == len(lines)


def test_the_hash_follows_names_and_bytes_and_not_the_place(tmp_path: Path) -> None:
    def hash_of(folder: str, **files: str) -> str:
        return read_corpus(write(tmp_path / folder, **files)).hash

    first = hash_of("1", a="text\n", b="more")
    assert first == hash_of("2", a="text\r\n", b="more") and len(first) == 64
    changed = [{"a": "texts\n", "b": "more"}, {"a": "text\n", "c": "more"}]
    moved = [{"a": "text\nbm", "o": "re"}, {"a": "text\nm", "b": "ore"}]  # names and texts in a row spell the same
    others = [hash_of(f"other {i}", **files) for i, files in enumerate(changed + moved)]
    assert len({first, *others}) == 5


def test_bad_files_among_good_ones_are_skipped_and_counted(tmp_path: Path) -> None:
    good = {"a.txt": "good text " * 9, "b.md": b"\xef\xbb\xbfwith a mark " * 1, "z/ü.txt": "schön 🙂 " * 9}
    bad = {"x.bin": b"a\0b", "y.bin": b"\0", "latin.txt": "é".encode("latin-1"), "empty": b"", ".git/config": b"text"}
    data = write(tmp_path, **good, **bad)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    corpus = read_corpus(data)
    assert corpus.skipped == {"binary": 2, "not UTF-8": 1, "empty": 1, "hidden": 1, "unreadable": 2}
    assert corpus.n_documents == 3
    both = "".join(corpus.train + corpus.validation)
    assert "with a mark" in both and "\ufeff" not in both and "schön 🙂" in both


@pytest.mark.parametrize("max_bytes", [1, 2, 10, 11, 12, 13, 25, 32, 1000])
def test_max_bytes_cuts_whole_characters_only(tmp_path: Path, max_bytes: int) -> None:
    texts = {"a": "z" + "ä" * 5, "b": "b" + "ö" * 5, "c": "ü" * 5}  # 11, 11 and 10 bytes
    write(tmp_path, **texts)
    corpus = read_corpus(DataConfig(source=str(tmp_path), max_bytes=max_bytes))
    assert max_bytes - 1 <= corpus.n_bytes <= max_bytes or corpus.n_bytes == 32
    kept = "".join(texts.values()).encode()[:max_bytes].decode(errors="ignore")
    assert sorted("".join(corpus.train + corpus.validation)) == sorted(kept)
    assert corpus.skipped == {}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("some text " * 20)
    assert read_corpus(DataConfig(source=str(tmp_path))).n_documents == 1


def test_stdlib_leaves_out_what_crosses_a_split(tmp_path: Path) -> None:
    kept = {"abc.py": "", "json/decoder.py": "", "unittest/case.py": ""}
    left_out = "test/a.py json/tests/a.py site-packages/a/b.py idlelib/a.py lib2to3/a.py distutils/command/a.py a.txt"
    left_out += " ensurepip/a.py encodings/a.py pydoc_data/a.py turtledemo/a.py _sysconfigdata_x.py config-3/a.py"
    write(tmp_path, **kept, **dict.fromkeys(left_out.split(), ""))
    assert stdlib_names(tmp_path) == sorted(kept)


def test_stdlib_is_real_text_split_by_path() -> None:
    corpus, root = read_corpus(DataConfig()), Path(os.__file__).parent
    names = stdlib_names(root)
    held_out = [name for name in names if is_validation(name) and (root / name).stat().st_size]
    assert corpus.validation == [(root / name).read_text(encoding="utf-8") for name in held_out]
    assert "json/decoder.py" in names and corpus.n_documents > 300 and corpus.n_bytes > 5_000_000


@pytest.mark.parametrize(
    ("files", "name", "skipped"),
    [
        ({}, ".", ""),
        ({"a.bin": b"\0", "b.bin": b"\0", "c.txt": b"\xff"}, ".", "; skipped 2 binary, 1 not UTF-8"),
        ({"a": b"a\0b", "good": "good"}, "a", "; skipped 1 binary"),
        ({"a": b"\xff\xfea", "good": "good"}, "a", "; skipped 1 not UTF-8"),
        ({"a": b"", "good": "good"}, "a", "; skipped 1 empty"),
    ],
)
def test_why_a_source_yields_nothing_is_said(tmp_path: Path, files: dict, name: str, skipped: str) -> None:
    write(tmp_path, **files)
    source = str(tmp_path / name)
    expected = f"data.source={source} yields no text{skipped}; name a source that holds UTF-8 text"
    assert message_of(DataConfig(source=source)) == expected


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> str:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("parquet")
    texts = [f"document {i} is text 🙂\r\n" for i in range(300)] + [None, ""]
    pq.write_table(pa.table({"text": texts, "number": list(range(302))}), folder / "rows.parquet")
    return str(folder / "*.parquet")


def test_hugging_face_parquet(parquet: str) -> None:
    corpus = read_corpus(DataConfig(source="hf:parquet", data_files=parquet, max_bytes=10**6))
    texts = [f"document {i} is text 🙂\n" for i in range(300)]
    assert corpus.validation == [text for text in texts if is_validation(text)] and corpus.validation
    assert corpus.train == [text for text in texts if not is_validation(text)]
    assert corpus.skipped == {"empty": 2}
    corpus = read_corpus(DataConfig(source="hf:parquet", data_files=parquet, max_bytes=46))
    assert (corpus.n_documents, corpus.n_bytes) == (2, 24 + 19)  # of 46 bytes, one is CR; the cut halves an emoji


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "/no/such"}, "data.source=/no/such: no such file or folder; write stdlib, a path, or hf:NAME"),
        ({"text_field": "content"}, "data.text_field=content is no column of hf:parquet; it has text, number"),
        ({"text_field": "number"}, "data.text_field=number of hf:parquet holds int, not text"),
        ({"data_files": "/no/such/*.parquet"}, "data.source=hf:parquet cannot be read ("),
        ({"data_files": None}, "data.source=hf:parquet needs data.data_files"),
        ({"source": "hf:a/b"}, "data.source=hf:a/b cannot be read (ConnectionError: cannot reach the hub)"),
    ],
)
def test_errors_say_what_is_wrong(monkeypatch, parquet: str, changes: dict, words: str) -> None:
    import datasets

    load_dataset_builder = datasets.load_dataset_builder

    def offline(name: str, *args, **options):
        if name == "a/b":
            raise ConnectionError("cannot reach\nthe hub")
        return load_dataset_builder(name, *args, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    given = {"source": "hf:parquet", "data_files": parquet, "max_bytes": 1000} | changes
    assert message_of(DataConfig(**given)).startswith(words)


def test_hugging_face_package_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert message_of(DataConfig(source="hf:someone/text", max_bytes=100)) == (
        'data.source=hf:someone/text needs the package `datasets`: pip install "moe-lab[online]"'
    )
