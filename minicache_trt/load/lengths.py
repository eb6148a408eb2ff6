"""How long prompts and answers are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Lengths(Protocol):
    """A distribution of numbers of tokens."""

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """``count`` numbers of at least 1."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Whole numbers of equal probability around ``mean``; with ``ratio`` 0 always the same.

    Parameters
    ----------
    mean : int
        Tokens.
    ratio : float
        Reaches from ``mean * (1 - ratio)`` to ``mean * (1 + ratio)``, both rounded, in [0, 1).
    """

    mean: int
    ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.mean < 1:
            raise ValueError(f"mean: expected at least 1, got {self.mean}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"range_ratio: expected a number in [0, 1), got {self.ratio}")

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        low, high = round(self.mean * (1 - self.ratio)), round(self.mean * (1 + self.ratio))
        numbers: list[int] = rng.integers(max(1, low), high, count, endpoint=True).tolist()
        return numbers


@dataclass(frozen=True)
class LogNormal:
    """Many short and a few long ones, as in conversations: the logarithm is normally distributed.

    Parameters
    ----------
    mean : int
        Mean of the distribution, in tokens, before it is cut.
    sigma : float
        Standard deviation of the natural logarithm; the median is ``mean * exp(-sigma**2 / 2)``.
    high : int
        Larger numbers become this one.
    """

    mean: int
    sigma: float
    high: int

    def __post_init__(self) -> None:
        if self.mean < 1:
            raise ValueError(f"mean: expected at least 1, got {self.mean}")
        if not (math.isfinite(self.sigma) and 0 <= self.sigma <= 5):
            raise ValueError(f"sigma: expected a number from 0 to 5, got {self.sigma}")
        if self.high < 1:
            raise ValueError(f"high: expected at least 1, got {self.high}")

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        numbers = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        clipped: list[int] = np.clip(np.rint(numbers), 1, self.high).astype(int).tolist()
        return clipped
