"""Windows of text and recall sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.calibration.samples import sample_sets
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 300, 4096)


class Letters:
    """A tokenizer of one token per character, with tokens around documents."""

    bos_token_id, eos_token_id, all_special_ids = 0, 1, (0, 1)

    def __len__(self) -> int:
        return 300

    def encode(self, text: str) -> list[int]:
        return [0, *(ord(letter) % 290 + 5 for letter in text)]

    def decode(self, token_ids: list[int], **_: Any) -> str:
        raise NotImplementedError


SETTINGS = CalibrationSettings(
    length=256, moment_sequences=10, gradient_sequences=3, search_sequences=4, verify_sequences=6, recall_share=0.3
)


def text_file(directory: Path, size: int) -> Path:
    rng = np.random.default_rng(0)
    path = directory / "text.txt"
    words = ["".join(map(chr, rng.integers(97, 123, 7))) for _ in range(size)]
    words[::5] = ["caf\u00e9 \u20ac"] * len(words[::5])
    path.write_text("".join(f"{word}{chr(10)}{chr(0) if i % 50 == 49 else ''}" for i, word in enumerate(words)),
                    encoding="utf-8", newline="")  # fmt: skip
    return path


def test_sets_are_mixed_and_disjoint(tmp_path: Path) -> None:
    sets = sample_sets(text_file(tmp_path, 4000), Letters(), CONFIG, SETTINGS)
    assert [len(each) for each in (sets.moments, sets.search, sets.verify)] == [10, 4, 6] and sets.gradients == 3
    assert [int(each.recall.sum()) for each in (sets.moments, sets.search, sets.verify)] == [3, 1, 2]
    assert sets.moments.recall[:3].sum() == 1
    windows = [tuple(row) for each in (sets.moments, sets.search, sets.verify) for row in each.tokens]
    assert len(set(windows)) == 20 and all(len(row) == 256 and row[0] == 0 for row in windows)
    text = [row for each in (sets.moments, sets.search, sets.verify) for row in each.tokens[~each.recall]]
    assert any((row == 1).any() for row in text)
    for each in (sets.moments, sets.search, sets.verify):
        assert not each.scored[:, :128].any() and not each.scored[:, -1].any()
        assert each.scored[~each.recall][:, 128:-1].all()


def test_recall_sequences_repeat_what_is_scored(tmp_path: Path) -> None:
    sets = sample_sets(text_file(tmp_path, 4000), Letters(), CONFIG, SETTINGS)
    for row, scored in zip(
        sets.moments.tokens[sets.moments.recall], sets.moments.scored[sets.moments.recall], strict=True
    ):
        first = int(np.flatnonzero(scored)[0])
        size = next(n for n in range(64, 256) if (row[1 + n :] == row[1:-n]).all())
        assert first == max(128, size + 1) and not np.isin(row[1:], (0, 1)).any()
        assert len(set(row[1 : 1 + size])) > 30


def test_the_same_whatever_the_text_is_read_in(tmp_path: Path) -> None:
    path = text_file(tmp_path, 4000)
    first, again = (sample_sets(path, Letters(), CONFIG, SETTINGS) for _ in range(2))
    np.testing.assert_array_equal(first.verify.tokens, again.verify.tokens)
    seeded = sample_sets(path, Letters(), CONFIG, CalibrationSettings(**{**vars(SETTINGS), "seed": 1}))
    assert (seeded.moments.tokens != first.moments.tokens).any()


def test_texts_that_do_not_do(tmp_path: Path) -> None:
    def refused(content: bytes | None) -> str:
        path = tmp_path / "other.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            sample_sets(path, Letters(), CONFIG, SETTINGS)
        return str(caught.value)

    assert "cannot be read: No such file" in refused(None)
    assert "too short: 14 windows of 256 tokens need about 3584 tokens" in refused(b"abcd " * 100)
    assert "too short" in refused(b"")
    assert "is not UTF-8 text" in refused(b"abc\xff\xfe" * 5000)
