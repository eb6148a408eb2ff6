"""Directions on the sphere in PyTorch: angles, interpolation of two, weighted mean of more.

Source: MiniCache, arXiv 2405.14366, section 3.2, for two layers; the mean of more is ours. All arithmetic is float32.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from minicache_trt.compression.constants import ANTIPODAL_MARGIN, KARCHER_STEPS, SMALL_ANGLE


def directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norm ``[..., 1]`` and unit direction of the last axis; the direction of a zero vector is zero."""
    norm = x.square().sum(-1, keepdim=True).sqrt()
    return norm, torch.where(norm > 0, x / norm, torch.zeros_like(x))


def _angle(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(-1, keepdim=True).clamp(-1.0, 1.0).acos()


def largest_angle(units: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Largest pairwise angle ``[..., 1]`` of unit vectors in radians, and where angles have no meaning (an antipodal
    pair, or a zero vector)."""
    omega = _angle(units[0], units[1])
    for first, second in itertools.islice(itertools.combinations(units, 2), 1, None):
        omega = torch.maximum(omega, _angle(first, second))
    meaningless = omega > math.pi - ANTIPODAL_MARGIN
    for unit in units:
        meaningless = meaningless | (unit.abs().amax(-1, keepdim=True) == 0)
    return omega, meaningless


def slerp(first: Tensor, second: Tensor, omega: Tensor, meaningless: Tensor, t: float) -> Tensor:
    """Spherical interpolation of unit vectors ``[..., vector]`` at angle ``omega``, ``t`` the weight of ``second``.

    Angles below `SMALL_ANGLE` are interpolated linearly and normalised; where the angle has no meaning the result is
    ``second`` (the paper leaves both cases open).
    """
    sine = omega.sin()
    safe = torch.where(sine > 0, sine, torch.ones_like(sine))
    curved = ((1 - t) * omega).sin() / safe * first + (t * omega).sin() / safe * second
    _, straight = directions((1 - t) * first + t * second)
    result = torch.where(omega < SMALL_ANGLE, straight, curved)
    return torch.where(meaningless, second, result)


def layer_weights(count: int, t: float) -> list[float]:
    """Weight of each direction, proportional to ``t**i * (1 - t)**(count - 1 - i)``; they add up to 1."""
    raw = [t**i * (1 - t) ** (count - 1 - i) for i in range(count)]
    return [weight / sum(raw) for weight in raw]


def spherical_mean(units: list[Tensor], meaningless: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Weighted mean direction of more than two unit vectors, by `KARCHER_STEPS` steps from the normalised sum.

    Returns
    -------
    mean : Tensor
        Where the mean has no meaning, the last direction.
    meaningless : Tensor
        As given, and where the weighted sum is zero.
    """
    weights = layer_weights(len(units), t)
    norm, mean = directions(_weighted_sum(weights, units))
    meaningless = meaningless | (norm == 0)
    for _ in range(KARCHER_STEPS):
        step = _weighted_sum(weights, [_logarithm(mean, unit) for unit in units])
        _, mean = directions(_exponential(mean, step))
    return torch.where(meaningless, units[-1], mean), meaningless


def _weighted_sum(weights: list[float], vectors: list[Tensor]) -> Tensor:
    total = weights[0] * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total = total + weight * vector
    return total


def _logarithm(base: Tensor, unit: Tensor) -> Tensor:
    """Tangent vector at ``base`` that points to ``unit`` and is as long as their angle."""
    cosine = (base * unit).sum(-1, keepdim=True).clamp(-1.0, 1.0)
    theta = cosine.acos()
    sine = theta.sin()
    factor = torch.where(theta < SMALL_ANGLE, torch.ones_like(theta), theta / torch.where(sine > 0, sine, 1.0))
    return factor * (unit - cosine * base)


def _exponential(base: Tensor, tangent: Tensor) -> Tensor:
    """Where the great circle from ``base`` along ``tangent`` arrives."""
    length, direction = directions(tangent)
    return length.cos() * base + length.sin() * direction
