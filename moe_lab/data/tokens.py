"""A byte-level BPE of the training text, and texts as its tokens."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
PIECE = 1 << 18  # characters: longer texts are encoded in pieces, since encoding takes many times a text's memory
PIECES_AT_ONCE = 16


def train_tokenizer(texts: list[str], vocab_size: int, progress: bool) -> Tokenizer:
    """Byte-level BPE: every byte is a token of its own before the first merge, so that any text comes back whole.

    Source: Sennrich et al. 2016, sec. 3.2, https://arxiv.org/abs/1508.07909; on bytes, Radford et al. 2019, sec. 2.2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # a pair seen once would only spell out one place of a small text
    options = {"special_tokens": [END_OF_TEXT], "min_frequency": 2, "show_progress": False}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **options)
    todo = [piece for text in texts for piece in pieces(text)]
    tokenizer.train_from_iterator(tqdm(todo, desc="counting words", delay=2, disable=not progress), trainer)
    tokenizer.encode_special_tokens = True
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


def pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]


def encode(tokenizer: Tokenizer, texts: list[str], progress: bool) -> np.ndarray:
    """Each text's tokens followed by end-of-text, in one 1-D stream of uint16 or uint32."""
    dtype = token_dtype(tokenizer)
    todo = [piece for text in texts for piece in (*pieces(text), "")]  # "" ends a text
    parts = [np.array([], dtype=dtype)]
    for first in tqdm(range(0, len(todo), PIECES_AT_ONCE), desc="encoding", delay=2, disable=not progress):
        encodings = tokenizer.encode_batch_fast(todo[first : first + PIECES_AT_ONCE])
        parts += [np.array(encoding.ids or [END_OF_TEXT_ID], dtype=dtype) for encoding in encodings]
    return np.concatenate(parts)


def write_meta(folder: Path, tokenizer: Tokenizer, validation: np.ndarray) -> None:
    """A tokenized text's meta.json: the vocabulary's size, and the bytes that its validation targets stand for."""
    # the byte-level alphabet writes each byte as one character; an end of text is none
    sizes = np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])
    sizes[END_OF_TEXT_ID] = 0
    meta = {"vocab_size": len(sizes), "validation_bytes": int(sizes[validation[1:]].sum())}
    (folder / "meta.json").write_text(json.dumps(meta))


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
