"""From one row of logits to a token: filters, draw, log-probabilities."""

from __future__ import annotations

from math import isfinite

import numpy as np
from numpy.typing import NDArray

from minicache_trt.runtime.penalties import change_logits, changes_logits
from minicache_trt.runtime.request import Logprob, SamplingParams

Logits = NDArray[np.float32]
Float64 = NDArray[np.float64]


class NonFiniteLogits(ValueError):
    """A row of logits holds NaN or infinity; nothing can be sampled from it."""


def check_finite(logits: Logits) -> None:
    """Refuse a row ``[vocab]`` with NaN or infinity.

    Raises
    ------
    NonFiniteLogits
        With the number of entries concerned.
    """
    if not (isfinite(logits.max()) and isfinite(logits.min())):  # both are NaN where there is one
        finite = int(np.count_nonzero(np.isfinite(logits)))
        raise NonFiniteLogits(
            f"logits: expected {logits.size} finite numbers, got {logits.size - finite} that are NaN or infinite"
        )


def sample(
    logits: Logits,
    params: SamplingParams,
    history: list[int],
    generator: np.random.Generator,
    prompt_len: int = 0,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Choose the next token.

    Sampling draws one number from ``generator`` per token and inverts the cumulative distribution over ascending
    token ids, so a seeded request gives the same tokens in any batch.

    Parameters
    ----------
    logits : float32 ``[vocab]``
        Raw logits; not modified.
    params : SamplingParams
        Filters and temperature.
    history : list of int
        Prompt and output so far, for the penalties.
    generator : numpy.random.Generator
        The request's own.
    prompt_len : int
        Tokens of ``history`` that are prompt.
    allowed : bool ``[vocab]``, optional
        Tokens that may come, at least one. Default: all.

    Raises
    ------
    NonFiniteLogits
        When the row holds NaN or infinity.
    """
    check_finite(logits)
    if params.temperature == 0 and allowed is None and not changes_logits(params):
        return int(np.argmax(logits))
    scores = logits.astype(np.float64)
    change_logits(scores, params, history, prompt_len)
    if allowed is not None:
        scores[~allowed] = -np.inf
    if params.temperature == 0:
        return int(np.argmax(scores))
    # The maximum becomes 0, so a tiny temperature can only push the others to -infinity, which is probability 0.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / params.temperature
    tokens = _candidates(scores, params)
    cumulative = np.cumsum(np.exp(scores[tokens]))
    draw = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(tokens[min(int(draw), len(tokens) - 1)])


def top_logprobs(logits: Logits, token: int, count: int) -> dict[int, Logprob]:
    """Log-probabilities under the raw logits: the ``count`` best tokens, best first, and ``token``."""
    scores = logits.astype(np.float64)
    shifted = scores - scores.max()
    normaliser = np.log(np.exp(shifted).sum())
    best = _largest(scores, count)
    best = best[np.argsort(-scores[best], kind="stable")][:count]
    chosen = [*best.tolist(), token] if token not in best else best.tolist()
    return {
        index: Logprob(float(shifted[index] - normaliser), 1 + int(np.count_nonzero(scores > scores[index])))
        for index in chosen
    }


def _largest(scores: Float64, count: int) -> NDArray[np.intp]:
    """Ids of the ``count`` largest scores and of all ties with the last of them, ascending."""
    if count == 0:
        return np.arange(0)
    if count >= len(scores):
        return np.arange(len(scores))
    return np.flatnonzero(scores >= np.partition(scores, -count)[-count])


def _candidates(scores: Float64, params: SamplingParams) -> NDArray[np.intp]:
    """Ids that pass top-k, top-p and min-p, ascending; the most likely one always does."""
    tokens = _largest(scores, params.top_k if params.top_k > 0 else len(scores))
    if params.top_p < 1:
        order = tokens[np.argsort(-scores[tokens], kind="stable")]
        probabilities = np.exp(scores[order])
        before = np.cumsum(probabilities) - probabilities
        tokens = np.sort(order[before < params.top_p * probabilities.sum()])
    if params.min_p > 0:
        tokens = tokens[scores[tokens] >= scores[tokens].max() + np.log(params.min_p)]
    return tokens[scores[tokens] > -np.inf]
