"""The paired bootstrap, against cases whose answer is known."""

from __future__ import annotations

import numpy as np
from scipy import stats

from minicache_trt.evaluation.bootstrap import Resamples, interval


def test_first_row_is_every_example_once() -> None:
    numerator, denominator = np.array([1.0, 2.0, 6.0]), np.array([1.0, 1.0, 4.0])
    figures = Resamples.of(3, samples=50).ratio(numerator, denominator)
    assert figures.shape == (51,) and figures[0] == 9 / 6
    possible = {round(numerator[list(c)].sum() / denominator[list(c)].sum(), 9) for c in np.ndindex(3, 3, 3)}
    assert {round(f, 9) for f in figures.tolist()} <= possible


def test_interval_of_a_mean_is_scipys() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 120)
    mine = interval(Resamples.of(120, samples=8000).ratio(values, np.ones(120)))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=8000, method="percentile", rng=7).confidence_interval
    assert np.allclose(mine, (theirs.low, theirs.high), atol=0.03)
    # 1.96 standard errors of a mean of 120.
    assert np.isclose((mine[1] - mine[0]) / 2, 1.96 * values.std() / np.sqrt(120), rtol=0.06)


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(0)
    hard, ones = rng.normal(3.0, 2.0, 40), np.ones(40)
    other = hard + 0.1 + rng.normal(0, 0.001, 40)
    resamples = Resamples.of(40)
    low, high = interval(resamples.ratio(other, ones) - resamples.ratio(hard, ones))
    assert 0.099 < low < high < 0.101
    alone = interval(resamples.ratio(hard, ones))
    assert alone[1] - alone[0] > 0.8
