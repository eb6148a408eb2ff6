"""Calibration text as token sequences, in memory that does not depend on the text's length."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path

from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import Tokenizer, load_tokenizer

DOCUMENT_END = "\n\0"
"""What separates documents; a text without it is one document."""
PIECE_BYTES = 1 << 15
"""Text read at a time; a longer document is cut, which changes nothing for statistics over tokens."""
MAX_TOKENS = 2048
"""Longest sequence the model is run on."""

Progress = Callable[[int, int], None]
"""Takes what is done and the total."""


def sequence_length(config: ModelConfig) -> int:
    """Tokens of the longest sequence: `MAX_TOKENS`, or as many as the model attends to at once."""
    return min(MAX_TOKENS, config.max_position_embeddings, config.sliding_window or MAX_TOKENS)


def required_tokenizer(directory: Path, text: Path) -> Tokenizer:
    """The tokenizer of a checkpoint that is to be calibrated on a text.

    Raises
    ------
    UserError
        There is none, or its files cannot be read.
    """
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(
            f"{directory}: no tokenizer, so there are no tokens of {text} to calibrate on",
            "put tokenizer.json beside config.json, or choose what needs no calibration",
        )
    return tokenizer


def token_sequences(path: Path, tokenizer: Tokenizer, config: ModelConfig, progress: Progress) -> Iterator[list[int]]:
    """Token ids of a text file, document by document, at most `sequence_length` at a time.

    Raises
    ------
    UserError
        The file cannot be read, is not UTF-8, or its tokens are not the model's.
    """
    length = sequence_length(config)
    for document in _documents(path, progress):
        ids = tokenizer.encode(document)
        if ids and max(ids) >= config.vocab_size:
            raise UserError(
                f"tokenizer: token {max(ids)} is beyond the model's vocabulary of {config.vocab_size}",
                "give a checkpoint whose tokenizer belongs to it",
            )
        yield from (ids[start : start + length] for start in range(0, len(ids), length))


def _documents(path: Path, progress: Progress) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    try:
        total, done = path.stat().st_size, 0
        with path.open("rb") as file:
            while data := file.read(PIECE_BYTES):
                yield from _split(decoder.decode(data))
                done += len(data)
                progress(done, total)
        yield from _split(decoder.decode(b"", final=True))
    except OSError as error:
        raise UserError(f"calibration text {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"calibration text {path} is not UTF-8 text: {error.reason}", "save it as UTF-8") from error


def _split(text: str) -> Iterator[str]:
    # The two characters of a separator may be in different pieces; a NUL alone is no text either.
    yield from (part for part in text.split(DOCUMENT_END[-1]) if part.strip())
