"""Large pages change where memory lies, never what it holds."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from minicache_trt.backends.huge_pages import PAGE, use_huge_pages


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has this request")
def test_memory_keeps_its_contents() -> None:
    memory = np.random.default_rng(0).integers(0, 255, 4 * PAGE, np.uint8)
    before = memory.copy()
    assert use_huge_pages() >= 3 * PAGE
    np.testing.assert_array_equal(memory, before)


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages() == 0
