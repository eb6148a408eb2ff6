"""What a calibration found out."""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.calibration.evaluator import Losses
from minicache_trt.calibration.search import Choice, Search, Verified
from minicache_trt.calibration.similarity import Similarities
from minicache_trt.calibration.state import State
from minicache_trt.calibration.target import Sizes

FRONT_RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Where the front of expected loss against size is drawn."""


@dataclass(frozen=True)
class FrontPoint:
    """The best plan of one size, by the sum of its streams' losses."""

    ratio: float
    bits: float
    expected: float


@dataclass(frozen=True)
class Calibration:
    """Everything a calibration found out.

    Parameters
    ----------
    chosen : Verified
        The plan.
    choice : list of Candidate
        Its streams (empty when a named method was better).
    tried, baselines : tuple of Verified
        Other plans that were measured whole.
    uncompressed : Losses
        Of the model itself, on the sequences the plans were verified on.
    front : tuple of FrontPoint
    state : State
        To be removed once everything is written.
    """

    chosen: Verified
    choice: Choice
    tried: tuple[Verified, ...]
    baselines: tuple[Verified, ...]
    uncompressed: Losses
    front: tuple[FrontPoint, ...]
    similarities: Similarities | None
    search: Search
    sizes: Sizes
    state: State
    text_hash: str
    checksum: str


def front(search: Search, sizes: Sizes) -> tuple[FrontPoint, ...]:
    """The best plan of each of `FRONT_RATIOS` that there is one of."""
    points = []
    for ratio in FRONT_RATIOS:
        budget = sizes.budget(ratio)
        choice = search.solve(budget) if budget > 0 else []
        if choice:
            size = sum(each.block_bytes for each in choice)
            expected = search.expected(choice)
            points.append(FrontPoint(sizes.ratio(size), sizes.bits(size), expected))
    return tuple(points)
