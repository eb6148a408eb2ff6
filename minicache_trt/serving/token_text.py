"""What single tokens look like in a response."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from minicache_trt.runtime.tokenizer import Tokenizer

SPACE = "\u2581"
"""How sentencepiece's vocabularies write a space."""


class TokenText:
    """Bytes and text of single tokens, leading spaces included, which decoding a token on its own may lose.

    Parameters
    ----------
    tokenizer : Tokenizer, optional
        Without one, a token's text is its id.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer: Any = tokenizer
        self._byte_level = _is_byte_level(tokenizer)
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 of the token, which may begin or end inside a character."""
        if token not in self._known:
            self._known[token] = self._bytes_of(token)
        return self._known[token]

    def text_of(self, token: int) -> str:
        """Text of the token; ``bytes:`` and escapes, as OpenAI writes them, where it is not whole characters."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _bytes_of(self, token: int) -> bytes:
        if self._tokenizer is None:
            return str(token).encode()
        if not hasattr(self._tokenizer, "convert_ids_to_tokens"):
            return self._decode(token)
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if token in self._tokenizer.added_tokens_decoder:
            return str(piece).encode()
        if self._byte_level:
            return bytes(_byte_of()[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace(SPACE, " ").encode() if SPACE in piece else self._decode(token)

    def _decode(self, token: int) -> bytes:
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text).encode(errors="replace")


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", [])]
    return any(part.get("type") == "ByteLevel" for part in parts)


@cache
def _byte_of() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for: printable ones for themselves, others shifted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
