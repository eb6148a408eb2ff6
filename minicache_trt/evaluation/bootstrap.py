"""Paired bootstrap: how far a figure, and its difference between two methods, depends on the examples drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLES = 2000
LEVEL = 95.0
"""Per cent of the resampled figures an interval holds."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Resamples:
    """Examples drawn with replacement, the same ones for every method; row 0 is every example once.

    Parameters
    ----------
    chosen : int ``[1 + samples, n]``
    """

    chosen: NDArray[np.int64]

    @classmethod
    def of(cls, examples: int, samples: int = SAMPLES, seed: int = 0) -> Resamples:
        drawn = np.random.default_rng(seed).integers(0, examples, (samples, examples))
        return cls(np.concatenate([np.arange(examples)[None], drawn]))

    def ratio(self, numerator: Array, denominator: Array) -> Array:
        """Sum over sum, for the examples as they are and for every resample: ``[1 + samples]``."""
        result: Array = numerator[self.chosen].sum(-1) / denominator[self.chosen].sum(-1)
        return result


def interval(figures: Array) -> tuple[float, float]:
    """Percentile interval of resampled figures, as `Resamples.ratio` or differences of its results give them."""
    edge = (100 - LEVEL) / 2
    low, high = np.percentile(figures[1:], [edge, 100 - edge])
    return float(low), float(high)
