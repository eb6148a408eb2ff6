"""Large pages change where memory lies, never what it holds."""

from __future__ import annotations

import mmap
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicache_trt.backends.huge_pages import PAGE, HugePages, _without


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has this request")
def test_new_memory_keeps_its_contents() -> None:
    old = np.random.default_rng(0).integers(0, 255, 4 * PAGE, np.uint8)
    pages = HugePages()
    mapping = mmap.mmap(-1, 24 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    new = np.frombuffer(mapping, np.uint8)
    new[:] = np.random.default_rng(1).integers(0, 255, 24 * PAGE, np.uint8)
    before = old.copy(), new.copy()
    assert pages.collapse_new() >= 23 * PAGE
    assert pages.collapse_new() < 23 * PAGE
    for memory, contents in zip((old, new), before, strict=True):
        np.testing.assert_array_equal(memory, contents)


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert HugePages().collapse_new() == 0


@given(st.tuples(st.integers(0, 9), st.integers(1, 9)), st.lists(st.integers(0, 20), max_size=6, unique=True))
def test_difference_of_regions(region: tuple[int, int], cuts: list[int]) -> None:
    start, length = region
    points = sorted(cuts)
    others = list(zip(points[::2], points[1::2], strict=False))
    left = {x for a, b in _without((start, start + length), others) for x in range(a, b)}
    assert left == {x for x in range(start, start + length) if not any(a <= x < b for a, b in others)}
