"""Averages over positions against sums over positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minicache_trt.calibration.rotary import average_mean, average_moment, unrotate
from minicache_trt.config import ModelConfig, RopeConfig

POSITIONS = 300


def config(fraction: float) -> ModelConfig:
    return ModelConfig("phi3", 4, 64, 64, 4, 2, 32, 100, 4096, rope=RopeConfig(theta=500.0, rotary_fraction=fraction))


def rotations(fraction: float) -> np.ndarray:
    """``[POSITIONS, D, D]``, row vectors times the matrix; pairs (i, i + R / 2) of the first R components turn."""
    rotary, result = int(32 * fraction), np.tile(np.eye(32), (POSITIONS, 1, 1))
    for i in range(rotary // 2):
        angle = np.arange(POSITIONS) * 500.0 ** (-2 * i / rotary)
        j = i + rotary // 2
        result[:, i, i] = result[:, j, j] = np.cos(angle)
        result[:, i, j], result[:, j, i] = np.sin(angle), -np.sin(angle)
    return result


@pytest.mark.parametrize("fraction", [1.0, 0.75, 0.5])
def test_averages_are_those_of_all_positions(fraction: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 50, 96)) @ rng.standard_normal((96, 96)) + 1.0
    moment, mean = x.swapaxes(-1, -2) @ x / 50, x.mean(1)
    turn = rotations(fraction)
    whole = np.zeros((POSITIONS, 96, 96))
    for member in range(3):
        own = slice(member * 32, (member + 1) * 32)
        whole[:, own, own] = turn
    expected = np.mean([r.T @ moment @ r for r in whole], 0)
    np.testing.assert_allclose(average_moment(config(fraction), moment, POSITIONS), expected, atol=1e-4)
    expected = np.mean([mean[:, :32] @ r for r in turn], 0)
    np.testing.assert_allclose(average_mean(config(fraction), mean[:, :32], POSITIONS), expected, atol=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.75])
def test_unrotation_undoes_rotation(fraction: float) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, POSITIONS, 32))
    rotated = np.einsum("shtd,tde->shte", x, rotations(fraction))
    found = unrotate(config(fraction), torch.from_numpy(rotated).float())
    np.testing.assert_allclose(found, x, atol=1e-3)
