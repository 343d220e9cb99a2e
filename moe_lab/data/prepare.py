"""From documents to token streams on disk: a byte-level BPE of the training text, kept by content."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from moe_lab.config import ROOT, ConfigError, DataConfig, ModelConfig
from moe_lab.data.corpus import Corpus, count_line, open_source, read_corpus
from moe_lab.data.stream import IN_MEMORY, stream
from moe_lab.data.tokens import encode, train_tokenizer, write_meta

CACHE = ROOT / ".cache"
FORMAT = 1  # raise it whenever the same text would give other files


class Dataset(NamedTuple):
    """A tokenized corpus. Both streams are 1-D, uint16 or uint32, memory-mapped and read-only."""

    tokenizer: Tokenizer
    train: np.ndarray  # documents, each followed by end-of-text
    validation: np.ndarray
    folder: Path  # what was written for this corpus and vocabulary
    corpus_hash: str  # sha256 over names and bytes of all documents, hex
    was_read: str  # source, documents, bytes, corpus, what was skipped
    vocab_size: int  # actual: at most model.vocab_size
    validation_bytes: int  # UTF-8 bytes that validation[1:] stands for; an end-of-text stands for none

    def describe(self) -> str:
        tokens = f"{len(self.train):,} training and {len(self.validation):,} validation tokens"
        return f"{self.was_read}\n{tokens}, vocabulary {self.vocab_size:,}"


def prepare(data: DataConfig, model: ModelConfig, cache_dir: Path | None = None, progress: bool = True) -> Dataset:
    """Read the corpus, and train a tokenizer and encode the text unless that was done before.

    The files lie in `cache_dir / "data"`, in a folder named by their content: the source itself is read each time. But
    a Hugging Face data set of which much is asked for is streamed once, and named by what the library knows of its
    files. Raises ConfigError if the source cannot be read or holds too little text for `model.max_seq_len`.
    """
    cache, corpus = Path(cache_dir or CACHE) / "data", None
    if data.source.startswith("hf:") and data.max_bytes > IN_MEMORY:
        key = name_of(open_source(data)[1], data.text_field, data.max_bytes, model.vocab_size, FORMAT)
        corpus = stream(data, model.vocab_size, key, cache, progress)
    if corpus is None:
        corpus = read_corpus(data, progress)
        key = name_of(corpus.hash, model.vocab_size, FORMAT)
        if not (cache / key).exists():
            write(cache / key, corpus, model.vocab_size, progress)
    folder = cache / key
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        train, validation = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{folder} is damaged ({' '.join(str(error).split())}); delete it, and run again") from error
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> out does not end there
    if len(train) < model.max_seq_len + 1 or len(validation) < 2:
        found = f"{len(train):,} training tokens (model.max_seq_len + 1 = {model.max_seq_len + 1:,} are needed)"
        found += f" and {len(validation):,} validation tokens (2 are needed)"
        todo = "give more text, raise data.max_bytes or lower model.max_seq_len"
        raise ConfigError(f"data.source={data.source} is too little text: {found}; {todo}")
    was_read = f"{data.source}: {corpus.n_documents:,} documents, {corpus.n_bytes:,} bytes, "
    was_read += f"corpus {corpus.hash[:12]}{count_line(corpus.skipped)}"
    return Dataset(tokenizer, train, validation, folder, corpus.hash, was_read, **meta)


def name_of(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:32]


def write(folder: Path, corpus: Corpus, vocab_size: int, progress: bool) -> None:
    """Make the files of `folder`, which appears at once and whole; a process that was faster wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        draft = Path(temporary) / "draft"
        draft.mkdir()
        tokenizer = train_tokenizer(corpus.train, vocab_size, progress)
        tokenizer.save(str(draft / "tokenizer.json"))
        np.save(draft / "train.npy", encode(tokenizer, corpus.train, progress))
        validation = encode(tokenizer, corpus.validation, progress)
        np.save(draft / "validation.npy", validation)
        write_meta(draft, tokenizer, validation)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():  # else another process made the same files meanwhile
                raise
