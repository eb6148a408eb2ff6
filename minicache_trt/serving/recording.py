"""Logits a request was served with, at positions spread over its output."""

from __future__ import annotations

import numpy as np

from minicache_trt.runtime.sampler import Logits


class Recording:
    """Keeps the rows of every s-th token; when the rows fill up, every second is dropped and s doubles.

    Parameters
    ----------
    capacity : int
        Most rows kept, an even number.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity: expected a positive even number, got {capacity}")
        self.rows: dict[int, Logits] = {}
        self._capacity = capacity
        self._stride = 1
        self._seen = 0

    def add(self, position: int, logits: Logits) -> None:
        """The token at ``position`` was sampled from these raw logits ``[vocab]``, which are copied."""
        if self._seen % self._stride == 0:
            if len(self.rows) == self._capacity:
                self.rows = dict(list(self.rows.items())[::2])
                self._stride *= 2
            if self._seen % self._stride == 0:
                self.rows[position] = np.array(logits, np.float32)
        self._seen += 1
