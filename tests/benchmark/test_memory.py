"""The high-water mark of a process, and that it can start over."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from minicache_trt.benchmark.memory import PeakMemory

SIZE = 200 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_since_reset() -> None:
    memory = PeakMemory(os.getpid())
    memory.reset()
    before = memory.read()
    assert before is not None and before > 0
    block = np.ones(SIZE, np.uint8)
    del block
    high = memory.read()
    assert high is not None and high > before + SIZE // 2
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pytest.skip("this system keeps the mark")
    memory.reset()
    after = memory.read()
    assert after is not None and after < high - SIZE // 2


def test_process_that_does_not_exist() -> None:
    memory = PeakMemory(0)
    memory.reset()
    assert memory.read() is None
