"""How many requests are sent, and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Load:
    """One point of a sweep.

    Parameters
    ----------
    request_rate : float
        Requests per second on average; infinite sends all at once.
    burstiness : float
        Shape of the gamma distribution of the times between requests: 1 is a Poisson process, less comes in bursts,
        more is steadier.
    max_concurrency : int, optional
        Requests under way at a time; others wait in the generator. Default: no limit.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None

    def __post_init__(self) -> None:
        if not self.request_rate > 0:
            raise ValueError(f"request_rate: expected a positive number or inf, got {self.request_rate}")
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            raise ValueError(f"burstiness: expected a positive number, got {self.burstiness}")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"max_concurrency: expected at least 1, got {self.max_concurrency}")

    @property
    def label(self) -> str:
        """Short name of the point."""
        limit = "unlimited" if self.max_concurrency is None else str(self.max_concurrency)
        return f"{limit} at once" + (f", {self.request_rate:g}/s" if math.isfinite(self.request_rate) else "")

    def arrivals(self, rng: np.random.Generator, count: int) -> list[float]:
        """Seconds from the start at which ``count`` requests are due, the first one at 0."""
        if math.isinf(self.request_rate):
            return [0.0] * count
        gaps = rng.gamma(self.burstiness, 1 / (self.request_rate * self.burstiness), count)
        times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return times


WARM_UP = -1
"""Number of the warm-up among the points, for its random numbers."""


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    Parameters
    ----------
    loads : tuple of Load
        The points.
    num_prompts : int
        Requests of each point.
    num_warmups : int
        Requests before the first point, as many at a time as there; not counted.
    seed : int
        Decides prompts, lengths and arrival times.
    """

    loads: tuple[Load, ...]
    num_prompts: int = 100
    num_warmups: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.loads:
            raise ValueError("loads: expected at least one")
        for name, least in (("num_prompts", 1), ("num_warmups", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def generator(self, point: int) -> np.random.Generator:
        """Random numbers of a point; points share none, so no prefix cache knows the next one's prompts."""
        return np.random.default_rng([self.seed, point - WARM_UP])


def all_loads(rates: Sequence[float], concurrencies: Sequence[int | None], burstiness: float) -> tuple[Load, ...]:
    """Every combination."""
    return tuple(Load(rate, burstiness, limit) for rate in rates for limit in concurrencies)
