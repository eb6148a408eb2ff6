"""Tokenizers of engines and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from minicache_trt.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


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
