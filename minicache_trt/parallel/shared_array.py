"""An array that one process writes and another reads, without a copy on its way."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Written:
    """What the writer tells the reader: a float32 array of this shape is there."""

    shape: tuple[int, ...]


class SharedArray:
    """Memory of no file (``memfd_create``, Linux), which grows as needed and is gone with the last process that has it.

    Unlike ``/dev/shm``, which containers keep small, it counts as the processes' own memory.

    Parameters
    ----------
    fd : int
        Of `create`, here or in the process that started this one.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory: mmap.mmap | None = None

    @classmethod
    def create(cls) -> SharedArray | None:
        """New memory, or None where the system has no such thing."""
        make = getattr(os, "memfd_create", None)
        return None if make is None else cls(make("minicache-trt-logits"))

    def write(self, array: NDArray[np.float32]) -> Written:
        """Put an array there, over what was there before."""
        if array.nbytes > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, array.nbytes)
        self._view(array.shape)[...] = array
        return Written(array.shape)

    def read(self, written: Written) -> NDArray[np.float32]:
        """The array itself, until the next one is written."""
        return self._view(written.shape)

    def _view(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        count = int(np.prod(shape))
        if count == 0:
            return np.empty(shape, np.float32)
        if self._memory is None or len(self._memory) < 4 * count:
            # The one before lives as long as arrays on it do.
            self._memory = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        array: NDArray[Any] = np.frombuffer(self._memory, np.float32, count).reshape(shape)
        return array
