"""Lloyd-Max quantizer of the standard normal distribution, from its definition.

Source: Max, *Quantizing for minimum distortion*, IRE Trans. Inf. Theory 6 (1960).
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

CONVERGED = 1e-12
"""Lloyd's iteration ends when no level moves farther."""


@cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """``2**bits`` levels, ascending: each is the mean of the distribution between its neighbouring boundaries."""
    count = 2**bits
    levels = tuple(4.0 * (i + 0.5) / count - 2.0 for i in range(count))
    while True:
        edges = (-math.inf, *midpoints(levels), math.inf)
        moved = tuple(_mean_between(low, high) for low, high in pairwise(edges))
        if max(abs(a - b) for a, b in zip(moved, levels, strict=True)) < CONVERGED:
            return moved
        levels = moved


def midpoints(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Boundaries between neighbouring levels."""
    return tuple((low + high) / 2 for low, high in pairwise(levels))


def _mean_between(low: float, high: float) -> float:
    """Mean of a standard normal variable, given that it lies between ``low`` and ``high``."""
    mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return (_density(low) - _density(high)) / mass


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
