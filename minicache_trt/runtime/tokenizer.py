"""Text out of tokens, one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from minicache_trt.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the first output tokens, for tokenizers that treat the start of a text specially."""
REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """Tokenizer of an engine or checkpoint directory, None when it has no tokenizer files.

    Raises
    ------
    UserError
        When the files cannot be read.
    """
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"tokenizer: cannot load the tokenizer in {directory}: {' '.join(str(error).split())}",
            "repair its tokenizer files, or give prompts as token ids",
        ) from error
    tokenizer: Tokenizer = loaded
    return tokenizer


def decoder_of(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    """A tokenizer's ``decode`` without special tokens and without cleaning up.

    transformers' own goes through several layers before it asks the library behind it, which takes longer than the
    answer; where none of them changes the text, the library is asked directly.
    """
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        kind: Any = type(tokenizer)
        if all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")):
            backend = tokenizer.backend_tokenizer
            return lambda token_ids: backend.decode(token_ids, skip_special_tokens=True)
    return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Text of one output, exact at character and stop-string boundaries.

    Tokens [read, end) are still undecided because they end inside a character; [prefix, read) have been decoded and
    give them their context. Text that could be the beginning of a stop string is not handed out by `take`.

    Parameters
    ----------
    tokenizer : Tokenizer
        Decodes lists of ids.
    prompt_token_ids : list of int
        Its end is context for the first output tokens.
    stop_strings : tuple of str
        Text is cut before the first of them.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], stop_strings: tuple[str, ...]) -> None:
        self._decode = decoder_of(tokenizer)
        self._stop_strings = stop_strings
        self._token_ids = prompt_token_ids[-CONTEXT_TOKENS:]
        if self._decode(self._token_ids).endswith(REPLACEMENT):
            self._token_ids = []
        self._prefix = 0
        self._read = len(self._token_ids)
        self._taken = 0
        self._closed = False
        self.text = ""
        self.stop_match: str | None = None

    def append(self, token_id: int) -> None:
        """Add a token; sets ``stop_match`` when it completes a stop string."""
        self._token_ids.append(token_id)
        new = self._undecided_text()
        if new and not new.endswith(REPLACEMENT):
            self._prefix, self._read = self._read, len(self._token_ids)
            self._extend(new)

    def close(self) -> None:
        """No more tokens: give up waiting for the rest of a character."""
        if self.stop_match is None:
            self._extend(self._undecided_text())
        self._closed = True

    def take(self) -> str:
        """Text that is certain to be part of the output and was not taken before."""
        end = len(self.text) if self._closed or self.stop_match else len(self.text) - self._held_back()
        delta = self.text[self._taken : end]
        self._taken += len(delta)
        return delta

    def _undecided_text(self) -> str:
        context = self._decode(self._token_ids[self._prefix : self._read])
        return self._decode(self._token_ids[self._prefix :])[len(context) :]

    def _extend(self, new: str) -> None:
        searched = len(self.text)
        self.text += new
        found = []
        for index, stop in enumerate(self._stop_strings):
            position = self.text.find(stop, max(0, searched - len(stop) + 1))
            if position >= 0:
                found.append((position, index))
        if found:
            position, index = min(found)
            self.stop_match = self._stop_strings[index]
            self.text = self.text[:position]

    def _held_back(self) -> int:
        if not self._stop_strings:
            return 0
        for length in range(max(map(len, self._stop_strings), default=0), 0, -1):
            tail = self.text[-length:]
            if len(tail) == length and any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0
