"""Alignment and matching against what they are defined by."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from minicache_trt.calibration.matching import assignment, match_heads, procrustes


def orthogonal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal(shape))[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_assignment_is_the_cheapest(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(20):
        cost = rng.standard_normal((n, n))
        found = assignment(cost)
        least = min(cost[np.arange(n), list(order)].sum() for order in permutations(range(n)))
        assert sorted(found) == list(range(n))
        assert cost[np.arange(n), found].sum() == pytest.approx(least)


def test_procrustes_is_orthogonal_and_best() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((3, 400, 16)) @ rng.standard_normal((16, 16))
    x = y @ orthogonal(rng, 3, 16, 16) + 0.3 * rng.standard_normal(y.shape)
    found = procrustes(x.swapaxes(-1, -2) @ y)
    np.testing.assert_allclose(found @ found.swapaxes(-1, -2), np.tile(np.eye(16), (3, 1, 1)), atol=1e-10)

    def error(turn: np.ndarray) -> float:
        return float(((x @ turn - y) ** 2).sum())

    skew = rng.standard_normal((50, 3, 16, 16))
    skew = 0.05 * (skew - skew.swapaxes(-1, -2))
    unit = np.eye(16)
    nearby = [found @ np.linalg.solve(unit - s, unit + s) for s in skew]  # Cayley: orthogonal
    assert all(error(found) < error(turn) for turn in nearby)
    assert all(error(found) < error(orthogonal(rng, 3, 16, 16)) for _ in range(20))


def test_heads_are_found_again() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((300, 5, 16))
    order = rng.permutation(5)
    second = np.empty_like(first)
    second[:, order] = np.einsum("nhd,hde->nhe", first, orthogonal(rng, 5, 16, 16))
    second += 0.5 * rng.standard_normal(second.shape)
    np.testing.assert_array_equal(match_heads(first, second), order)
