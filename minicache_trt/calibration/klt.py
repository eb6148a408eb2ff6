"""The joint Karhunen-Loeve transform of a group of layers, in the metric of what errors cost.

With the second moment C of the group's vectors side by side (about their mean) and the sensitivity F of the loss, the
transform diagonalises ``L^T C L`` for ``L L^T = F`` (plus a damping, since F is an estimate): an error of any component
then costs the same, and numbers of variance s^2 stored in b bits cost ``s^2 d(b) / 2``. With F = identity it is the
ordinary KLT.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SMALLEST_DEVIATION = 1e-6
"""Of a component, relative to the largest; constants must be positive."""


@dataclass(frozen=True)
class JointTransform:
    """Transform of a group of m layers, per slot; components in descending order of what they carry.

    Parameters
    ----------
    encode : ndarray
        ``[H, m D, m D]``: y = (x - mean) encode.
    decode : ndarray
        Its inverse.
    mean : ndarray
        ``[H, m D]``.
    sigma : ndarray
        ``[H, m D]``, standard deviations of y, positive.
    cost : ndarray
        ``[H, m D]``: loss when a component is dropped, F without damping.
    """

    encode: Array
    decode: Array
    mean: Array
    sigma: Array
    cost: Array

    def constants(self, rank: int, gaussian: bool) -> dict[str, NDArray[np.generic]]:
        """A linear stream's matrices for the first ``rank`` components."""
        result = {
            "encode": self.encode[..., :rank],
            "decode": self.decode[:, :rank],
            "mean": self.mean,
            **({"sigma": self.sigma[:, :rank]} if gaussian else {}),
        }
        return {name: np.ascontiguousarray(value, np.float32) for name, value in result.items()}


def joint_transform(second: Array, mean: Array, sensitivity: Array, damping: float) -> JointTransform:
    """Transform from ``second [H, m D, m D]`` (about zero), ``mean [H, m D]`` and ``sensitivity [H, m D, m D]``."""
    covariance = second - mean[:, :, None] * mean[:, None]
    unit = np.eye(mean.shape[-1])
    size = np.trace(sensitivity, axis1=-2, axis2=-1)[:, None, None] / mean.shape[-1]
    metric = sensitivity + damping * np.where(size > 0, size, 1.0) * unit
    lower = np.linalg.cholesky(metric)
    values, vectors = np.linalg.eigh(lower.swapaxes(-1, -2) @ covariance @ lower)
    values, vectors = values[:, ::-1].clip(0), vectors[..., ::-1]
    decode = np.linalg.solve(lower.swapaxes(-1, -2), vectors).swapaxes(-1, -2)
    sigma = np.sqrt(values)
    sigma = np.maximum(sigma, SMALLEST_DEVIATION * np.maximum(sigma[:, :1], np.finfo(np.float32).tiny))
    cost = 0.5 * values * np.einsum("hri,hij,hrj->hr", decode, sensitivity, decode, optimize=True)
    return JointTransform(lower @ vectors, decode, mean, sigma, cost)
