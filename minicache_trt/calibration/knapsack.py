"""Which stream for which layers: a knapsack over bytes whose items are groups of neighbouring layers.

Layers form a chain for keys and a chain for values; a choice cuts both into groups and picks one option for each. Both
problems, least loss within a budget and fewest bytes within a loss, are solved exactly by one table over (layers done,
bytes used), in units of the options' greatest common divisor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_UNITS = 20_000
"""Columns of the table; beyond it, units grow and bytes are rounded up."""


@dataclass(frozen=True)
class Option:
    """One way to store layers ``[start, start + size)`` of chain ``chain`` (0: keys, 1: values)."""

    chain: int
    start: int
    size: int
    block_bytes: int
    loss: float


class Table:
    """Least loss for every number of bytes, up to ``budget`` per block.

    Parameters
    ----------
    options : sequence of Option
    num_layers : int
    budget : int
        Bytes.
    """

    def __init__(self, options: Sequence[Option], num_layers: int, budget: int) -> None:
        self._options = options
        exact = math.gcd(*(option.block_bytes for option in options))
        self._unit = max(exact, -(-budget // MOST_UNITS))
        self._width = budget // self._unit + 1
        self._sizes = [-(-option.block_bytes // self._unit) for option in options]
        self._layers = num_layers
        self._solve()

    def _solve(self) -> None:
        places = 2 * self._layers + 1
        self._best = np.full((places, self._width), np.inf)
        self._best[0, 0] = 0.0
        self._chosen: NDArray[np.int32] = np.full((places, self._width), -1, np.int32)
        order = sorted(range(len(self._options)), key=lambda index: self._place(index)[1])
        for index in order:
            start, end = self._place(index)
            size = self._sizes[index]
            if size >= self._width:
                continue
            reached = self._best[start, : self._width - size] + self._options[index].loss
            target, chosen = self._best[end, size:], self._chosen[end, size:]
            better = reached < target
            target[better], chosen[better] = reached[better], index

    def _place(self, index: int) -> tuple[int, int]:
        option = self._options[index]
        start = option.chain * self._layers + option.start
        return start, start + option.size

    def least_loss(self) -> list[int] | None:
        """Indices of the options of least loss within the budget, None if nothing fits; ties take fewer bytes."""
        row = self._best[-1]
        return self._trace(int(row.argmin())) if np.isfinite(row.min()) else None

    def fewest_bytes(self, loss: float) -> list[int] | None:
        """Indices of the smallest options that lose at most ``loss``, None if there are none within the budget."""
        enough = np.flatnonzero(self._best[-1] <= loss)
        return self._trace(int(enough[0])) if len(enough) else None

    def _trace(self, units: int) -> list[int]:
        place, result = len(self._best) - 1, []
        while place:
            index = int(self._chosen[place, units])
            result.append(index)
            units -= self._sizes[index]
            place = self._place(index)[0]
        return result[::-1]


def fewest_bytes(options: Sequence[Option], num_layers: int) -> int:
    """Bytes per block of the smallest choice there is."""
    least = [0.0] + [math.inf] * (2 * num_layers)
    for option in sorted(options, key=lambda each: (each.chain, each.start)):
        start = option.chain * num_layers + option.start
        least[start + option.size] = min(least[start + option.size], least[start] + option.block_bytes)
    return int(least[-1])
