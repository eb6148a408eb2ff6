"""Rotary embeddings of any share of a head: undone, and averaged over positions.

Components i and i + R / 2 of the first R = rotary_dim ones form a complex number that position p turns by p * theta_i;
the components beyond R are paired as well and never turn. A second moment of such numbers z has two parts::

    E[z_a conj(z_b)]   which position p turns by p * (theta_a - theta_b)
    E[z_a z_b]         which position p turns by p * (theta_a + theta_b)

so that its mean over positions is a factor for each entry, with no sum over positions of matrices.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.config import ModelConfig
from minicache_trt.model.rope import inverse_frequencies

Array = NDArray[np.float64]


def pairs(config: ModelConfig) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """First and second components of the pairs, and radians per position, ``[D / 2]`` each."""
    rotary, dim = config.rotary_dim, config.head_dim
    rest = (dim - rotary) // 2
    first = np.concatenate([np.arange(rotary // 2), rotary + np.arange(rest)])
    second = np.concatenate([rotary // 2 + np.arange(rotary // 2), rotary + rest + np.arange(rest)])
    theta = inverse_frequencies(config.rope, config.head_dim).double().numpy()
    return first, second, np.concatenate([theta, np.zeros(rest)])


def unrotate(config: ModelConfig, x: Tensor) -> Tensor:
    """Undo the embedding of ``[..., T, D]`` at positions 0 to T - 1 (a factor of LongRoPE stays)."""
    first, second, theta = pairs(config)
    angles = torch.arange(x.shape[-2])[:, None].float() * torch.from_numpy(theta).float()
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., first], x[..., second]
    result = torch.empty_like(x)
    result[..., first], result[..., second] = a * cos + b * sin, b * cos - a * sin
    return result


def average_moment(config: ModelConfig, moment: Array, positions: int) -> Array:
    """Second moments ``[..., m D, m D]`` of vectors before RoPE, of the same vectors after it, averaged over positions.

    Every position from 0 to ``positions`` - 1 counts alike; the layers of a group are at the same position.
    """
    first, second, theta = pairs(config)
    members = moment.shape[-1] // config.head_dim
    offsets = np.arange(members)[:, None] * config.head_dim
    a, b, angle = (offsets + first).ravel(), (offsets + second).ravel(), np.tile(theta, members)
    aa, bb = _block(moment, a, a), _block(moment, b, b)
    ab, ba = _block(moment, a, b), _block(moment, b, a)
    hermitian = (aa + bb + 1j * (ba - ab)) * _mean_turn(angle[:, None] - angle, positions)
    plain = (aa - bb + 1j * (ba + ab)) * _mean_turn(angle[:, None] + angle, positions)
    result = np.empty_like(moment)
    total, difference = (hermitian + plain) / 2, (hermitian - plain) / 2
    result[..., a[:, None], a] = total.real
    result[..., b[:, None], b] = difference.real
    result[..., b[:, None], a] = total.imag
    result[..., a[:, None], b] = -difference.imag
    return result


def average_mean(config: ModelConfig, mean: Array, positions: int) -> Array:
    """Means ``[..., D]`` of vectors before RoPE, averaged likewise after it."""
    first, second, theta = pairs(config)
    turned = (mean[..., first] + 1j * mean[..., second]) * _mean_turn(theta, positions)
    result = np.empty_like(mean)
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def _block(moment: Array, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
    return moment[..., rows[:, None], columns]


def _mean_turn(angle: Array, positions: int) -> NDArray[np.complex128]:
    """Mean of exp(i p angle) over p = 0 .. positions - 1."""
    step = np.exp(1j * angle)
    still = np.abs(step - 1) < 1e-12
    ratio = (np.exp(1j * angle * positions) - 1) / np.where(still, 1, step - 1) / positions
    return np.where(still, 1, ratio)
