"""Logits from a device in memory of the host."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class HostLogits:
    """One buffer for the logits of every step, as large as the largest so far.

    Parameters
    ----------
    vocab_size : int
    device : torch.device
        Where logits come from; for a GPU the buffer is pinned.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffer = torch.empty(0, vocab_size)

    def take(self, logits: Tensor) -> NDArray[np.float32]:
        """float32 ``[rows, vocab]`` that the next call overwrites; waits for the device."""
        return self.gather([logits])

    def gather(self, parts: list[Tensor]) -> NDArray[np.float32]:
        """Several steps' logits one below the other, likewise."""
        rows = sum(len(part) for part in parts)
        if len(self._buffer) < rows:
            self._buffer = torch.empty(rows, self._buffer.shape[1], pin_memory=self._pinned)
        start = 0
        for part in parts:
            self._buffer[start : start + len(part)].copy_(part.float())
            start += len(part)
        array: NDArray[np.float32] = self._buffer[:rows].numpy()
        return array
