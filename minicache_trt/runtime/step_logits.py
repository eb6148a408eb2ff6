"""The logits of one step, and what is asked of all its rows at once."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class StepLogits:
    """Logits ``[N, vocab]`` of the rows a step computed, in the order of its items; valid until the next step.

    Parameters
    ----------
    values : float32 ``[N, vocab]``
    """

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values

    @cached_property
    def greedy(self) -> list[int | None]:
        """The most likely token of each row, the first of several; None where a logit is NaN or infinite."""
        rows = np.arange(len(self.values))
        best = self.values.argmax(axis=1)
        # NaN counts as the largest number and as the smallest one.
        finite = np.isfinite(self.values[rows, best]) & np.isfinite(self.values.min(axis=1))
        tokens: list[int] = best.tolist()
        return [token if known else None for token, known in zip(tokens, finite.tolist(), strict=True)]

    def last_rows(self, last: int, count: int) -> NDArray[np.float32]:
        """The ``count`` rows before row ``last``."""
        return self.values[last - count : last]
