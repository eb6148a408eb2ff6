"""Arrays in memory that two processes share."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from minicache_trt.parallel.shared_array import SharedArray, Written

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has memfd_create")

WRITER = """
import sys
import numpy as np
from minicache_trt.parallel.shared_array import SharedArray
shared = SharedArray(int(sys.argv[1]))
for line in sys.stdin:
    rows = int(line)
    print(shared.write(np.arange(rows * 5, dtype=np.float32).reshape(rows, 5) + rows).shape[0], flush=True)
"""


def test_arrays_of_any_size_arrive() -> None:
    """Larger, smaller, empty and larger again; the array read last is the memory itself."""
    shared = SharedArray.create()
    assert shared is not None
    command = [sys.executable, "-c", WRITER, str(shared.fd)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[shared.fd]
    ) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        for rows in (3, 4000, 1, 0, 9000):
            writer.stdin.write(f"{rows}\n")
            writer.stdin.flush()
            assert int(writer.stdout.readline()) == rows
            array = shared.read(Written((rows, 5)))
            expected = np.arange(rows * 5, dtype=np.float32).reshape(rows, 5) + rows
            np.testing.assert_array_equal(array, expected)
        writer.stdin.write("2\n")
        writer.stdin.flush()
        writer.stdout.readline()
        assert array[0, 0] == 2.0
        writer.stdin.close()
    os.close(shared.fd)
