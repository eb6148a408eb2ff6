"""Where two traces of the same tokens part, by polygraphy's comparators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.tracing.points import Trace, layer_of

LOGITS = "logits"
"""The last point of a comparison; traces hold it beside the points of the decoder."""


@dataclass(frozen=True)
class PointDifference:
    """How two sides differ at one trace point, over all tokens of all prompts.

    Parameters
    ----------
    point : str
    layer : int or None
    max_abs_diff, mean_abs_diff : float
        Of the numbers.
    relative_error : float
        Norm of the difference over the norm of side B (infinite where B is zero and A is not).
    cosine : float
        Of all numbers of A and all numbers of B as one vector each.
    within : bool
        Whether ``relative_error`` is at most the tolerance; False if a number is not finite.
    """

    point: str
    layer: int | None
    max_abs_diff: float
    mean_abs_diff: float
    relative_error: float
    cosine: float
    within: bool

    def to_dict(self) -> dict[str, Any]:
        """Numbers that are not finite, which JSON has no word for, are None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Divergence:
    """Two sides, point by point.

    Parameters
    ----------
    tolerance : float
        Of the relative error.
    points : tuple of PointDifference
        In the order of computation.
    lengths : tuple of (int, int)
        Tokens of each prompt, and with its continuation.
    profile : float64 ``[points without the logits, tokens]``
        Relative error of each token; prompts one after another.
    """

    tolerance: float
    points: tuple[PointDifference, ...]
    lengths: tuple[tuple[int, int], ...]
    profile: NDArray[np.float64]

    @property
    def first(self) -> PointDifference | None:
        """The first point, in the order of computation, beyond the tolerance."""
        return next((point for point in self.points if not point.within), None)

    def first_token(self) -> tuple[int, int] | None:
        """Prompt and position of the first token whose own error exceeds the tolerance at the first point.

        None where there is no such point, or it is the logits.
        """
        first = self.first
        if first is None or first.point == LOGITS:
            return None
        row = self.profile[self.points.index(first)]
        index = int(np.argmax(~(row <= self.tolerance)))
        for prompt, (_, length) in enumerate(self.lengths):
            if index < length:
                return prompt, index
            index -= length
        raise AssertionError("profile is longer than the prompts")

    def to_dict(self) -> dict[str, Any]:
        first, token = self.first, self.first_token()
        return {
            "tolerance": self.tolerance,
            "first": None if first is None else first.to_dict(),
            "first_token": None if token is None else {"prompt": token[0], "position": token[1]},
            "prompts": [{"prompt_tokens": n, "generated_tokens": end - n} for n, end in self.lengths],
            "points": [point.to_dict() for point in self.points],
        }


def diverge(a: Sequence[Trace], b: Sequence[Trace], lengths: Sequence[tuple[int, int]], tolerance: float) -> Divergence:
    """Compare two sides' traces, one per prompt on each side.

    Parameters
    ----------
    a, b : sequence of Trace
        With the same points and shapes; `LOGITS`, if it is there, last.
    lengths : sequence of (int, int)
        See `Divergence`.
    tolerance : float
        Of the relative error at a point.
    """
    points, profile = [], []
    for name in a[0]:
        mine, theirs = (np.concatenate([trace[name] for trace in side]).astype(np.float64) for side in (a, b))
        points.append(compare_point(name, mine, theirs, tolerance))
        if name != LOGITS:
            profile.append(_ratio(np.linalg.norm(mine - theirs, axis=1), np.linalg.norm(theirs, axis=1)))
    return Divergence(tolerance, tuple(points), tuple(lengths), np.array(profile))


def compare_point(name: str, a: NDArray[np.float64], b: NDArray[np.float64], tolerance: float) -> PointDifference:
    """Compare two arrays of one shape with polygraphy's simple, L2 and cosine comparators."""
    from polygraphy.comparator import (
        Comparator,
        CosineSimilarityCompareFunc,
        L2CompareFunc,
        RunResults,
        SimpleCompareFunc,
    )
    from polygraphy.logger import G_LOGGER

    norm = float(np.linalg.norm(b))
    results = RunResults()
    for side, array in (("a", a), ("b", b)):
        results.add([{name: array}], runner_name=side)
    functions = [
        SimpleCompareFunc(check_error_stat="max"),
        L2CompareFunc(l2_threshold=tolerance * norm),
        CosineSimilarityCompareFunc(),
    ]
    with G_LOGGER.verbosity(), np.errstate(all="ignore"):
        accuracy = Comparator.compare_accuracy(results, compare_func=functions)
    simple, l2, cosine = (result["a", "b"][0][name] for result in accuracy)
    return PointDifference(
        point=name,
        layer=layer_of(name),
        max_abs_diff=simple.max_absdiff,
        mean_abs_diff=simple.mean_absdiff,
        relative_error=float(_ratio(np.array(l2.l2_norm), np.array(norm))),
        cosine=cosine.cosine_similarity,
        within=bool(l2),
    )


def _ratio(difference: NDArray[np.float64], norm: NDArray[np.float64]) -> NDArray[np.float64]:
    """``difference / norm``, 0 where both are 0."""
    with np.errstate(all="ignore"):
        return np.where((difference == 0) & (norm == 0), 0.0, difference / norm)
