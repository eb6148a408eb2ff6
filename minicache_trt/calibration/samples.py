"""Token sequences to calibrate on: windows of a text, and synthetic sequences that can only be continued by recall."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.compression.calibration_text import DOCUMENT_END
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.tokenizer import Tokenizer

BYTES_PER_TOKEN = 8
"""Text read for a window, per token; a window that needs more reads on."""
SHORTEST_SEGMENT = 64
"""Tokens of the shortest repeated segment."""


@dataclass(frozen=True)
class Samples:
    """Sequences of equal length, and which of their tokens count.

    Parameters
    ----------
    tokens : ndarray
        ``[S, length]`` int64.
    scored : ndarray
        ``[S, length]`` bool: positions whose prediction of the next token is scored. Each has a next token, and
        compressed history to attend to.
    recall : ndarray
        ``[S]`` bool: synthetic recall sequences; the others are text.
    """

    tokens: NDArray[np.int64]
    scored: NDArray[np.bool_]
    recall: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, chosen: slice) -> Samples:
        """Some of the sequences."""
        return Samples(self.tokens[chosen], self.scored[chosen], self.recall[chosen])


@dataclass(frozen=True)
class SampleSets:
    """``moments`` (of which the first ``gradients`` sequences are differentiated), ``search`` and ``verify``."""

    moments: Samples
    gradients: int
    search: Samples
    verify: Samples


def text_hash(path: Path) -> str:
    """SHA-256 of the text.

    Raises
    ------
    UserError
        It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"calibration text {path} cannot be read: {error.strerror or error}") from error


def sample_sets(path: Path, tokenizer: Tokenizer, config: ModelConfig, settings: CalibrationSettings) -> SampleSets:
    """Evenly spread windows of a text, dealt out to the three sets, each with its share of recall sequences.

    Raises
    ------
    UserError
        The text cannot be read, is no UTF-8 or too short, or its tokens are not the model's.
    """
    sizes = (settings.moment_sequences, settings.search_sequences, settings.verify_sequences)
    recalls = [round(settings.recall_share * size) for size in sizes]
    texts = [size - recall for size, recall in zip(sizes, recalls, strict=True)]
    windows = text_windows(path, tokenizer, config, settings.length, sum(texts))
    order = np.random.default_rng(settings.seed).permutation(len(windows))
    rng = np.random.default_rng(settings.seed + 1)
    sets = []
    for size, recall in zip(texts, recalls, strict=True):
        own, order = order[:size], order[size:]
        sets.append(_mixed(windows[np.sort(own)], recall, tokenizer, config, settings, rng))
    return SampleSets(sets[0], min(settings.gradient_sequences, len(sets[0])), sets[1], sets[2])


def _mixed(
    windows: NDArray[np.int64],
    recall: int,
    tokenizer: Tokenizer,
    config: ModelConfig,
    settings: CalibrationSettings,
    rng: np.random.Generator,
) -> Samples:
    """Text and recall sequences, the latter evenly among the former, so that any part of them is a mixture."""
    sequences = [_recall_sequence(tokenizer, config, settings.length, rng) for _ in range(recall)]
    tokens = np.concatenate([windows, np.array([row for row, _ in sequences], np.int64).reshape(-1, settings.length)])
    first = np.array([settings.window + BLOCK_SIZE] * len(windows) + [start for _, start in sequences])
    place = np.concatenate([(np.arange(n) + 0.5) / max(1, n) for n in (len(windows), recall)])
    order = np.argsort(place, kind="stable")
    positions = np.arange(settings.length)
    lowest = np.maximum(first, settings.window + BLOCK_SIZE)[:, None]
    scored = (positions >= lowest) & (positions < settings.length - 1)
    return Samples(tokens[order], scored[order], (np.arange(len(tokens)) >= len(windows))[order])


def _recall_sequence(
    tokenizer: Tokenizer, config: ModelConfig, length: int, rng: np.random.Generator
) -> tuple[list[int], int]:
    """Random ordinary tokens, repeated; and the first position that can know what follows."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    known = min(config.vocab_size, _vocabulary(tokenizer, config))
    ordinary = np.array([token for token in range(known) if token not in special])
    begin = _begin(tokenizer)
    size = int(rng.integers(SHORTEST_SEGMENT, max(SHORTEST_SEGMENT + 1, length // 3)))
    body = np.resize(rng.choice(ordinary, size), length - len(begin))
    return [*begin, *body.tolist()], len(begin) + size


def _vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> int:
    return len(tokenizer) if isinstance(tokenizer, Sized) else config.vocab_size


def _begin(tokenizer: Tokenizer) -> list[int]:
    token = getattr(tokenizer, "bos_token_id", None)
    return [] if token is None else [token]


def text_windows(path: Path, tokenizer: Tokenizer, config: ModelConfig, length: int, count: int) -> NDArray[np.int64]:
    """``count`` windows of ``length`` tokens that do not overlap: a part of the text each, read where it lies."""
    try:
        size = path.stat().st_size
        windows = []
        for index in range(count):
            start, end = (size * place // count for place in (index, index + 1))
            ids = _read_window(path, start, end, tokenizer, length)
            if len(ids) < length:
                raise UserError(
                    f"calibration text {path} is too short: {count} windows of {length} tokens need about "
                    f"{count * length} tokens",
                    "give a longer text of the kind the model will read, or fewer or shorter sequences",
                )
            windows.append(ids)
    except OSError as error:
        raise UserError(f"calibration text {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"calibration text {path} is not UTF-8 text: {error.reason}", "save it as UTF-8") from error
    result = np.array(windows, np.int64)
    if result.max(initial=0) >= config.vocab_size:
        raise UserError(
            f"tokenizer: token {result.max()} is beyond the model's vocabulary of {config.vocab_size}",
            "give a checkpoint whose tokenizer belongs to it",
        )
    return result


def _read_window(path: Path, start: int, end: int, tokenizer: Tokenizer, length: int) -> list[int]:
    """The first ``length`` tokens of bytes ``[start, end)``, fewer where there are not so many."""
    begin = _begin(tokenizer)
    wanted = BYTES_PER_TOKEN * length
    while True:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(min(wanted, end - start))
        ids = [*begin, *_encode(_decode(data, start > 0), tokenizer)][:length]
        if len(ids) == length or wanted >= end - start:
            return ids
        wanted *= 2


def _decode(data: bytes, inside: bool) -> str:
    """Text of a piece that may begin (if ``inside`` the file) and end within a character."""
    if inside:
        data = data[next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0) :]
    return codecs.getincrementaldecoder("utf-8-sig")().decode(data)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of documents, each but the last followed by the end-of-text token, where there is one."""
    end = getattr(tokenizer, "eos_token_id", None)
    documents: Sequence[str] = text.split(DOCUMENT_END)
    ids: list[int] = []
    for index, document in enumerate(documents):
        if document.strip("\0 \n"):
            ids += _plain(tokenizer, document.replace("\0", ""))
            ids += [] if end is None or index == len(documents) - 1 else [end]
    return ids


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens without those a tokenizer puts around every text."""
    ids = tokenizer.encode(text)
    begin, end = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    first = 1 if ids and begin is not None and ids[0] == begin else 0
    last = len(ids) - 1 if len(ids) > first and end is not None and ids[-1] == end else len(ids)
    return ids[first:last]
