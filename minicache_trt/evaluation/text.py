"""Text as what is scored: windows of it, and what the tasks are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.calibration_text import DOCUMENT_END
from minicache_trt.errors import UserError
from minicache_trt.evaluation.examples import Example, Source, Tokens


def read_documents(path: Path) -> list[str]:
    """Documents of a UTF-8 file, separated by a newline and a NUL; a file without them is one document.

    Raises
    ------
    UserError
        The file cannot be read or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--text: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--text: {path} is not UTF-8 text: {error.reason}", "save it as UTF-8") from error
    return [document for document in text.split(DOCUMENT_END) if document.strip("\0").strip()]


class TokenizedText:
    """Documents as one stream of tokens, each closed by the tokenizer's end token where it has one.

    Parameters
    ----------
    tokenizer
        A Hugging Face tokenizer.
    documents : list of str
    vocab_size : int
        Of the model; random segments are drawn from ordinary tokens below it.

    Raises
    ------
    UserError
        There are no tokens, or they are not the model's.
    """

    def __init__(self, tokenizer: Any, documents: list[str], vocab_size: int) -> None:
        ids = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if not any(ids):
            raise UserError("--text: there is no text in it", "give a text of the kind the model will read")
        self.ids: NDArray[np.int64] = np.concatenate([np.array([*row, *end], np.int64) for row in ids])
        if self.ids.max() >= vocab_size:
            raise UserError(
                f"tokenizer: token {self.ids.max()} is beyond the model's vocabulary of {vocab_size}",
                "give a checkpoint whose tokenizer belongs to it",
            )
        self.begin: Tokens = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def windows(self, length: int, count: int, first: int) -> list[Example]:
        """``count`` windows of ``length`` tokens, evenly spread; tokens from ``first`` on are scored.

        Fewer where they would overlap. Each window begins with the tokenizer's BOS where it has one.

        Raises
        ------
        UserError
            There is no window in the text, or nothing to score in a window.
        """
        size = length - len(self.begin)
        if length <= first:
            raise UserError(
                f"--length: windows of {length} tokens hold nothing to score, the first {first} are context",
                f"give at least {first + 1}",
            )
        if len(self.ids) < size:
            raise UserError(
                f"--text: {len(self.ids)} tokens are too few for a window of {length}",
                "give a longer text, or a smaller --length",
            )
        count = min(count, len(self.ids) // size)
        starts = np.linspace(0, len(self.ids) - size, count).astype(int)
        return [
            Example([*self.begin, *self.ids[start : start + size].tolist()], ((first, length),)) for start in starts
        ]

    def source(self) -> Source:
        """What the long-range tasks are made of: this text as haystack, ordinary tokens as noise."""
        ordinary = np.setdiff1d(np.arange(min(self._vocab_size, len(self._tokenizer))), self._tokenizer.all_special_ids)

        def encode(text: str) -> Tokens:
            ids: Tokens = self._tokenizer.encode(text, add_special_tokens=False)
            return ids

        return Source(encode, ordinary.tolist(), self.begin, self.ids)
