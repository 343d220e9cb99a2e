"""From documents to token streams on disk: a byte-level BPE of the training text, kept by content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from moe_lab.config import ROOT, ConfigError, DataConfig, ModelConfig
from moe_lab.data.corpus import Corpus, count_line, read_corpus

CACHE = ROOT / ".cache"
FORMAT = 1  # raise it whenever the same text would give other files
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
PIECE = 1 << 18  # characters: longer texts are encoded in pieces, since encoding takes many times a text's memory
PIECES_AT_ONCE = 16


class Dataset(NamedTuple):
    """A tokenized corpus. Both streams are 1-D, uint16 or uint32, memory-mapped and read-only."""

    tokenizer: Tokenizer
    train: np.ndarray  # documents, each followed by end-of-text
    validation: np.ndarray
    vocab_size: int  # actual: at most model.vocab_size
    corpus_hash: str  # sha256 over names and bytes of all documents, hex
    validation_bytes: int  # UTF-8 bytes that validation[1:] stands for; an end-of-text stands for none
    skipped: dict[str, int]  # reason -> files
    folder: Path  # what was written for this corpus and vocabulary
    source: str
    n_documents: int
    n_bytes: int  # UTF-8 bytes of all documents

    def describe(self) -> str:
        skipped = f"; {count_line(self.skipped)}" if self.skipped else ""
        return (
            f"{self.source}: {self.n_documents:,} documents, {self.n_bytes:,} bytes, corpus {self.corpus_hash[:12]}"
            f"{skipped}\n{len(self.train):,} training and {len(self.validation):,} validation tokens, "
            f"vocabulary {self.vocab_size:,}"
        )


def prepare(data: DataConfig, model: ModelConfig, cache_dir: Path | None = None, progress: bool = True) -> Dataset:
    """Read the corpus, and train a tokenizer and encode the text unless that was done before.

    The files lie in `cache_dir / "data"` (by default `.cache` in the repository, or of an installed package in
    the current folder), in a folder named by their content.
    The source itself is read each time, so that a changed text is noticed.
    Raises ConfigError if the source cannot be read or holds too little text for `model.max_seq_len`.
    """
    corpus = read_corpus(data, progress)
    key = hashlib.sha256(f"{corpus.hash} {model.vocab_size} {FORMAT}".encode()).hexdigest()[:32]
    folder = Path(cache_dir or CACHE) / "data" / key
    if not folder.exists():
        write(folder, corpus, model.vocab_size, progress)
    dataset = open_folder(folder, data, corpus)
    n_train, n_validation = len(dataset.train), len(dataset.validation)
    if n_train < model.max_seq_len + 1 or n_validation < 2:
        raise ConfigError(
            f"data.source={data.source} is too little text: {n_train:,} training tokens (model.max_seq_len + 1 = "
            f"{model.max_seq_len + 1:,} are needed) and {n_validation:,} validation tokens (2 are needed); "
            "give more text, raise data.max_bytes or lower model.max_seq_len"
        )
    return dataset


def open_folder(folder: Path, data: DataConfig, corpus: Corpus) -> Dataset:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        train, validation = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{folder} is damaged ({' '.join(str(error).split())}); delete it, and run again") from error
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> out does not end there
    return Dataset(
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        vocab_size=meta["vocab_size"],
        corpus_hash=corpus.hash,
        validation_bytes=meta["validation_bytes"],
        skipped=corpus.skipped,
        folder=folder,
        source=data.source,
        n_documents=corpus.n_documents,
        n_bytes=corpus.n_bytes,
    )


def write(folder: Path, corpus: Corpus, vocab_size: int, progress: bool) -> None:
    """Make the files of `folder`, which appears at once and whole; a process that was faster wins."""
    draft = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        tokenizer = train_tokenizer(corpus.train, vocab_size, progress)
        tokenizer.save(str(draft / "tokenizer.json"))
        np.save(draft / "train.npy", encode(tokenizer, corpus.train, progress))
        validation = encode(tokenizer, corpus.validation, progress)
        np.save(draft / "validation.npy", validation)
        meta = {
            "vocab_size": tokenizer.get_vocab_size(),
            "validation_bytes": int(n_bytes_of_tokens(tokenizer)[validation[1:]].sum()),
        }
        (draft / "meta.json").write_text(json.dumps(meta))
        try:
            os.replace(draft, folder)
        except OSError:
            if not folder.exists():  # else another process made the same files meanwhile
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def train_tokenizer(texts: list[str], vocab_size: int, progress: bool) -> Tokenizer:
    """Byte-level BPE: every byte is a token of its own before the first merge, so that any text comes back whole.

    Source: Sennrich et al. 2016, sec. 3.2, https://arxiv.org/abs/1508.07909; on bytes, Radford et al. 2019, sec. 2.2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once would only spell out one place of a small text
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    todo = [piece for text in texts for piece in pieces(text)]
    tokenizer.train_from_iterator(tqdm(todo, desc="counting words", delay=2, disable=not progress), trainer)
    tokenizer.encode_special_tokens = True
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


def pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]


def encode(tokenizer: Tokenizer, texts: list[str], progress: bool) -> np.ndarray:
    """Each text's tokens followed by end-of-text, in one 1-D stream of uint16 or uint32."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    todo, ends = [], []  # a text's last piece is followed by end-of-text
    for text in texts:
        todo += pieces(text)
        ends += [[]] * (len(todo) - len(ends) - 1) + [[END_OF_TEXT_ID]]
    parts = [np.array([], dtype=dtype)]
    n_characters = sum(map(len, todo))
    with tqdm(total=n_characters, desc="encoding", unit="char", unit_scale=True, delay=2, disable=not progress) as bar:
        for first in range(0, len(todo), PIECES_AT_ONCE):
            batch = todo[first : first + PIECES_AT_ONCE]
            for encoding, end in zip(tokenizer.encode_batch_fast(batch), ends[first:], strict=False):
                parts.append(np.array(encoding.ids + end, dtype=dtype))
            bar.update(sum(map(len, batch)))
    return np.concatenate(parts)


def n_bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes that each token stands for, (vocab_size,) int64."""
    # the byte-level alphabet writes each byte as one character
    sizes = np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])
    sizes[END_OF_TEXT_ID] = 0
    return sizes
