"""From documents to token streams on disk: a byte-level BPE of the training text, kept by content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
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

    The files lie in `cache_dir / "data"`, in a folder named by their content. The source itself is read each time, so
    that a changed text is noticed.
    Raises ConfigError if the source cannot be read or holds too little text for `model.max_seq_len`.
    """
    corpus = read_corpus(data, progress)
    key = hashlib.sha256(f"{corpus.hash} {model.vocab_size} {FORMAT}".encode()).hexdigest()[:32]
    folder = Path(cache_dir or CACHE) / "data" / key
    if not folder.exists():
        write(folder, corpus, model.vocab_size, progress)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        train, validation = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation"))
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{folder} is damaged ({' '.join(str(error).split())}); delete it, and run again") from error
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> out does not end there
    if len(train) < model.max_seq_len + 1 or len(validation) < 2:
        raise ConfigError(
            f"data.source={data.source} is too little text: {len(train):,} training tokens (model.max_seq_len + 1 = "
            f"{model.max_seq_len + 1:,} are needed) and {len(validation):,} validation tokens (2 are needed); "
            "give more text, raise data.max_bytes or lower model.max_seq_len"
        )
    was_read = f"{data.source}: {corpus.n_documents:,} documents, {corpus.n_bytes:,} bytes, "
    was_read += f"corpus {corpus.hash[:12]}{count_line(corpus.skipped)}"
    return Dataset(tokenizer, train, validation, folder, corpus.hash, was_read, **meta)


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
        # the byte-level alphabet writes each byte as one character; an end-of-text stands for none
        sizes = np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])
        sizes[END_OF_TEXT_ID] = 0
        meta = {"vocab_size": len(sizes), "validation_bytes": int(sizes[validation[1:]].sum())}
        (draft / "meta.json").write_text(json.dumps(meta))
        try:
            draft.rename(folder)
        except OSError:
            if not folder.exists():  # else another process made the same files meanwhile
                raise


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
    todo = [piece for text in texts for piece in (*pieces(text), "")]  # "" ends a text
    parts = [np.array([], dtype=dtype)]
    for first in tqdm(range(0, len(todo), PIECES_AT_ONCE), desc="encoding", delay=2, disable=not progress):
        encodings = tokenizer.encode_batch_fast(todo[first : first + PIECES_AT_ONCE])
        parts += [np.array(encoding.ids or [END_OF_TEXT_ID], dtype=dtype) for encoding in encodings]
    return np.concatenate(parts)
