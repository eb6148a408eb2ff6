"""Bits for the components of a joint transform: reverse water-filling in runs of 16."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.constants import gaussian_boundaries, gaussian_levels
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import MAX_RANK

RUN = 16
"""Components that share a width: lengths of segments are multiples of it."""
MOST_BITS = 4
WIDE_RUNS, NARROW_RUNS = 2, 2
"""Most runs in 8 and in 2 bits beside 4-bit ones (8 bits may also be all there is)."""

Array = NDArray[np.float64]


def gaussian_distortion(bits: int) -> float:
    """Mean squared error of N(0, 1) in its ``2**bits`` Lloyd-Max levels; 1 for 0 bits."""
    if not bits:
        return 1.0
    normal, edges = NormalDist(), (-50.0, *gaussian_boundaries(bits), 50.0)
    # With every level the mean of its cell, E(x - level)^2 = 1 - E level^2.
    kept = 0.0
    for level, (low, high) in zip(gaussian_levels(bits), pairwise(edges), strict=True):
        first = normal.pdf(low) - normal.pdf(high)
        kept += 2 * level * first - level**2 * (normal.cdf(high) - normal.cdf(low))
    return 1 - kept


DISTORTION = tuple(gaussian_distortion(bits) for bits in range(MOST_BITS + 1))


@dataclass(frozen=True)
class Allocation:
    """Segments of a linear stream, and the loss they are expected to cost."""

    segments: tuple[Segment, ...]
    expected: float


def gaussian_allocations(cost: Array) -> list[Allocation]:
    """Every step of the greedy allocation, cheapest first, for ``cost [n]`` of dropping each component (descending).

    Each step gives one bit to the run that gains most by it, which is optimal at every step, as gains fall with bits.
    Components beyond `MAX_RANK` are dropped.
    """
    runs = cost.reshape(-1, RUN).sum(-1)
    stored = runs[: MAX_RANK // RUN]
    lost = float(runs[len(stored) :].sum())
    bits = np.zeros(len(stored), np.int64)
    result = []
    gains = -np.diff(DISTORTION)
    for _ in range(MOST_BITS * len(stored)):
        gain = np.where(bits < MOST_BITS, stored * gains[np.minimum(bits, MOST_BITS - 1)], -1.0)
        bits[int(gain.argmax())] += 1
        expected = lost + float((stored * np.take(DISTORTION, bits)).sum())
        result.append(Allocation(_segments(bits), expected))
    return result


def _segments(bits: NDArray[np.int64]) -> tuple[Segment, ...]:
    """One segment per width; widths are sorted, since what is allocated falls with the run's number."""
    ordered = sorted((int(b) for b in bits if b), reverse=True)
    return tuple(Segment(RUN * len(list(run)), f"g{width}", transform="hadamard") for width, run in groupby(ordered))


def minmax_allocations(cost: Array) -> list[Allocation]:
    """Integer formats with a range per token and segment, the widest first; see `gaussian_allocations`.

    Up to `WIDE_RUNS` leading runs in 8 bits, any number after them in 4, up to `NARROW_RUNS` in 2.
    """
    runs = cost.reshape(-1, RUN).sum(-1)
    count = min(len(runs), MAX_RANK // RUN)
    result = []
    for wide in {*range(min(WIDE_RUNS, count) + 1), count}:
        for middle in range(count - wide + 1):
            for narrow in range(min(NARROW_RUNS, count - wide - middle) + 1):
                lengths = [("int8", wide), ("int4", middle), ("int2", narrow)]
                segments = [Segment(RUN * n, name, transform="hadamard") for name, n in lengths if n]
                if segments:
                    result.append(Allocation(tuple(segments), _minmax_loss(runs, segments)))
    return result


def _minmax_loss(runs: Array, segments: list[Segment]) -> float:
    ends = np.cumsum([segment.length // RUN for segment in segments])
    *parts, dropped = np.split(runs, ends)
    kept = (float(part.sum()) * _minmax_distortion(s) for part, s in zip(parts, segments, strict=True))
    return float(dropped.sum()) + sum(kept)


def _minmax_distortion(segment: Segment) -> float:
    """Expected error of a transformed segment relative to its variance: a uniform step over a normal sample's range.

    The largest of n normal numbers is expected at the quantile (n - 3/8) / (n + 1/4) (Blom, 1958).
    """
    n = segment.length
    spread = 2 * NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    return (spread / (2**segment.bits - 1)) ** 2 / 12
