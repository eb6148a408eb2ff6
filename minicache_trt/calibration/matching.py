"""Which KV heads of neighbouring layers belong together, and the rotation between them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def procrustes(cross: Array) -> Array:
    """Orthogonal matrices A ``[..., D, D]`` that bring x closest to y, ``min E|x A - y|^2``.

    Parameters
    ----------
    cross : ndarray
        ``[..., D, D]``, E[x y^T] of row vectors x and y.

    Source: Schönemann, *A generalized solution of the orthogonal Procrustes problem*, Psychometrika 31 (1966).
    """
    u, _, vt = np.linalg.svd(cross)
    result: Array = u @ vt
    return result


def match_heads(first: Array, second: Array) -> NDArray[np.int64]:
    """Head of the second layer for each head of the first, so that the matched pairs align best in all.

    Parameters
    ----------
    first, second : ndarray
        ``[n, H, D]``, the same tokens. The affinity of two heads is what `procrustes` can make of their mean inner
        product, relative to their norms.
    """
    cross = np.einsum("nhd,nke->hkde", first, second, optimize=True)
    norms = np.sqrt((first**2).sum((0, 2)))[:, None] * np.sqrt((second**2).sum((0, 2)))
    affinity = np.linalg.svd(cross, compute_uv=False).sum(-1) / np.where(norms > 0, norms, 1)
    return assignment(-affinity)


def assignment(cost: Array) -> NDArray[np.int64]:
    """Column of each row in the cheapest one-to-one assignment of a square matrix.

    Shortest augmenting paths with potentials (Kuhn, 1955; Munkres, 1957), O(n^3).
    """
    n = len(cost)
    row_potential, column_potential = np.zeros(n), np.zeros(n + 1)
    owner = np.full(n + 1, -1)
    for row in range(n):
        owner[n], column = row, n
        shortest, previous, done = np.full(n, np.inf), np.full(n, n), np.zeros(n + 1, bool)
        while owner[column] >= 0:
            done[column] = True
            own = owner[column]
            reduced = cost[own] - row_potential[own] - column_potential[:n]
            better = ~done[:n] & (reduced < shortest)
            shortest[better], previous[better] = reduced[better], column
            following = int(np.where(done[:n], np.inf, shortest).argmin())
            delta = shortest[following]
            row_potential[owner[done]] += delta
            column_potential[done] -= delta
            shortest[~done[:n]] -= delta
            column = following
        while column != n:
            owner[column] = owner[previous[column]]
            column = int(previous[column])
    result = np.empty(n, np.int64)
    result[owner[:n]] = np.arange(n)
    return result
