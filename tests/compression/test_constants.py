"""Lloyd-Max levels, recomputed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from minicache_trt.compression.constants import gaussian_boundaries, gaussian_levels


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _mass(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def lloyd_max(bits: int) -> list[float]:
    """Levels by Lloyd's iteration: each the mean of the normal distribution between its neighbours' midpoints."""
    count = 2**bits
    levels = [-2 + 4 * (i + 0.5) / count for i in range(count)]
    while True:
        edges = [-40.0, *((a + b) / 2 for a, b in pairwise(levels)), 40.0]
        new = [(_density(a) - _density(b)) / (_mass(b) - _mass(a)) for a, b in pairwise(edges)]
        if max(abs(a - b) for a, b in zip(levels, new, strict=True)) < 1e-11:
            return new
        levels = new


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_those_of_lloyd_and_max(bits: int) -> None:
    assert gaussian_levels(bits) == pytest.approx(lloyd_max(bits), abs=1.01e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_boundaries_lie_halfway(bits: int) -> None:
    levels, boundaries = gaussian_levels(bits), gaussian_boundaries(bits)
    assert len(boundaries) == 2**bits - 1 and list(boundaries) == sorted(boundaries)
    assert boundaries[len(boundaries) // 2] == 0.0
    for boundary, (low, high) in zip(boundaries, pairwise(levels), strict=True):
        assert boundary - low == pytest.approx(high - boundary)
