"""Text out of tokens, one token at a time."""

from __future__ import annotations

from typing import Any

from minicache_trt.runtime.tokenizer import Tokenizer

CONTEXT_TOKENS = 6
"""Prompt tokens decoded along with the first output tokens, for tokenizers that treat the start of a text specially."""
REPLACEMENT = "\ufffd"


class TokenDecoder:
    """A tokenizer's ``decode`` without special tokens and without cleaning up, and texts of single tokens.

    transformers' own ``decode`` goes through several layers before it asks the library behind it, which takes longer
    than the answer; where none of them changes the text, the library is asked directly. Tokens of a byte-level
    tokenizer are strings of bytes, whatever stands before them: those that are whole characters have a text of their
    own, which is asked for once.

    Parameters
    ----------
    tokenizer : Tokenizer
        Decodes lists of ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._is_byte_level = type(getattr(self._backend, "decoder", None)).__name__ == "ByteLevel"
        self._pieces: dict[int, str] = {}

    def __call__(self, token_ids: list[int]) -> str:
        """Text of a list of tokens."""
        if self._backend is not None:
            text: str = self._backend.decode(token_ids, skip_special_tokens=True)
            return text
        return self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, token_id: int) -> str | None:
        """What a token adds to a text that ends with a whole character; None when its neighbours decide that."""
        if not self._is_byte_level:
            return None
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self([token_id])
        return None if not piece or piece.endswith(REPLACEMENT) else piece


def _backend(tokenizer: Tokenizer) -> Any:
    """The library behind a fast tokenizer whose class does not change what it decodes; otherwise None."""
    from transformers import PreTrainedTokenizerFast

    kind: Any = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    unchanged = all(getattr(kind, name) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode"))
    return tokenizer.backend_tokenizer if unchanged else None


class Detokenizer:
    """Text of one output, exact at character and stop-string boundaries.

    Tokens [read, end) are still undecided because they end inside a character; [prefix, read) have been decoded and
    give them their context. Text that could be the beginning of a stop string is not handed out by `take`.

    Parameters
    ----------
    decoder : TokenDecoder
    prompt_token_ids : list of int
        Its end is context for the first output tokens.
    stop_strings : tuple of str
        Text is cut before the first of them.
    """

    def __init__(self, decoder: TokenDecoder, prompt_token_ids: list[int], stop_strings: tuple[str, ...]) -> None:
        self._decode = decoder
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
        alone = self._decode.piece(token_id) if self._read == len(self._token_ids) else None
        self._token_ids.append(token_id)
        new = self._undecided_text() if alone is None else alone
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
        end = len(self.text)
        if self._stop_strings and not (self._closed or self.stop_match):
            end -= self._held_back()
        delta = self.text[self._taken : end]
        self._taken += len(delta)
        return delta

    def _undecided_text(self) -> str:
        context = self._decode(self._token_ids[self._prefix : self._read])
        return self._decode(self._token_ids[self._prefix :])[len(context) :]

    def _extend(self, new: str) -> None:
        searched = len(self.text)
        self.text += new
        if not self._stop_strings:
            return
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
        for length in range(max(map(len, self._stop_strings), default=0), 0, -1):
            tail = self.text[-length:]
            if len(tail) == length and any(stop.startswith(tail) for stop in self._stop_strings):
                return length
        return 0
