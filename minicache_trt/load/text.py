"""Text of a wanted number of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import Tokenizer

WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "program", "question", "work", "number", "night", "point", "home", "water", "room", "mother", "area", "money",
    "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side",
    "kind", "head", "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law",
    "car", "city", "name", "team",
)  # fmt: skip
"""Common words, about a token each in most vocabularies."""

MAX_WORDS = 1_000_000


class TextMaker(Protocol):
    """Makes prompts, and guesses their size."""

    def make(self, rng: np.random.Generator, tokens: int) -> str:
        """Random text of about ``tokens`` tokens, at least one."""
        ...

    def count(self, text: str) -> int:
        """Tokens of a text, at least one."""
        ...


@dataclass(frozen=True)
class MeasuredText:
    """Text for an endpoint whose tokenizer is not at hand.

    Parameters
    ----------
    tokens_per_word : float
        As the endpoint counted `WORDS`.
    """

    tokens_per_word: float

    def make(self, rng: np.random.Generator, tokens: int) -> str:
        return random_words(rng, max(1, round(tokens / self.tokens_per_word)))

    def count(self, text: str) -> int:
        return max(1, round(len(text.split()) * self.tokens_per_word))


@dataclass(frozen=True)
class TokenizedText:
    """Text cut to size with the model's own tokenizer; what the endpoint adds (a template) comes on top."""

    tokenizer: Tokenizer

    def make(self, rng: np.random.Generator, tokens: int) -> str:
        words = tokens
        while True:
            ids = self.tokenizer.encode(random_words(rng, words))
            if len(ids) >= tokens or words >= MAX_WORDS:
                break
            words *= 2
        return self.tokenizer.decode(ids[:tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def count(self, text: str) -> int:
        return max(1, len(self.tokenizer.encode(text)))


def random_words(rng: np.random.Generator, count: int) -> str:
    """``count`` of `WORDS`, separated by spaces."""
    return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), count))


def tokens_per_word(short: tuple[int, int], long: tuple[int, int]) -> float | None:
    """From two texts' words and tokens: what a word costs, without what the endpoint adds to every prompt.

    None when the counts make no sense.
    """
    slope = (long[1] - short[1]) / (long[0] - short[0])
    return slope if math.isfinite(slope) and slope > 0 else None


def open_tokenizer(name: str) -> TokenizedText:
    """The tokenizer of an engine directory, a checkpoint or a hub id.

    Raises
    ------
    UserError
        There is none, or it cannot be loaded.
    """
    from minicache_trt.engine_directory import CHECKPOINT
    from minicache_trt.runtime.tokenizer import load_tokenizer

    directory = Path(name)
    if directory.is_dir():
        tokenizer = load_tokenizer(directory / CHECKPOINT) if (directory / CHECKPOINT).is_dir() else None
        tokenizer = tokenizer or load_tokenizer(directory)
        if tokenizer is None:
            raise UserError(f"--tokenizer: {name} has no tokenizer files")
        return TokenizedText(tokenizer)
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(name)
        return TokenizedText(loaded)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--tokenizer: cannot load {name}: {' '.join(str(error).split())}",
            "give a directory, a hub id, or leave it out: prompt lengths then follow the endpoint's own counts",
        ) from error
