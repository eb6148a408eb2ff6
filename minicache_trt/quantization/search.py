"""What AWQ searches: scales per input channel, and how far to clip each block of weights.

Source: Lin et al., *AWQ: Activation-aware Weight Quantization*, arXiv 2306.00978, section 3.2 (``s = mean|x|^alpha``,
alpha by a grid search on the error of the block's output) and its code (normalized scales, clipping). Deviations: the
grid is refined around the best of ten coarse steps; clipping minimises the error of each block's own products by the
inputs' second moments, over all calibration tokens, and may also widen a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.quantization.rounding import block_scales, blocks_of, rounded

COARSE = tuple(step / 10 for step in range(10))
FINE = 0.05
CLIPS = (1.15, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Factors of the scale that are tried beside 1. A scale maps a block's largest entry to -8: at 8/7, 7 would do."""
_ROWS = 1024
"""Rows that are clipped at a time."""


@dataclass(frozen=True)
class AwqSettings:
    """``search_sequences`` of the calibration's sequences measure errors; all of them count for statistics."""

    bits: int = 4
    block: int = 32
    search_sequences: int = 2


def channel_scales(magnitude: Tensor, alpha: float) -> Tensor:
    """``magnitude^alpha``, normalized so that the largest and the smallest are each other's inverse."""
    scales = magnitude.clamp(min=1e-8).pow(alpha).clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def best_alpha(error: Callable[[float], float]) -> tuple[float, float]:
    """Exponent of least error, and that error; 0 (no scales) is among those tried."""
    tried = {alpha: error(alpha) for alpha in COARSE}
    coarse = min(tried, key=lambda alpha: tried[alpha])
    for alpha in (coarse - FINE, coarse + FINE):
        if alpha > 0:
            tried[alpha] = error(alpha)
    best = min(tried, key=lambda alpha: tried[alpha])
    return best, tried[best]


def scaled_rounding(weight: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """What ``weight [out, in]`` becomes when its columns are scaled, rounded and scaled back."""
    blocks = blocks_of(weight * scales, block)
    values = rounded(blocks, block_scales(blocks, bits), bits).flatten(1)[:, : weight.shape[1]]
    return values / scales


def clip_factors(weight: Tensor, moments: Tensor, bits: int, block: int) -> Tensor:
    """Factor of each block's scale, ``[out, blocks]``, that leaves the least error of the block's products.

    Parameters
    ----------
    weight : Tensor
        ``[out, in]``, scales folded in.
    moments : Tensor
        ``[blocks, block, block]`` of the inputs, likewise.
    bits, block : int
    """
    return torch.cat([_clip_rows(rows, moments, bits, block) for rows in torch.split(weight, _ROWS)])


def _clip_rows(weight: Tensor, moments: Tensor, bits: int, block: int) -> Tensor:
    blocks = blocks_of(weight, block)
    scales = block_scales(blocks, bits)
    best, least = torch.ones_like(scales), _block_errors(blocks, scales, moments, bits)
    for factor in CLIPS:
        error = _block_errors(blocks, scales * factor, moments, bits)
        better = error < least
        best[better] = factor
        least = torch.where(better, error, least)
    return best


def _block_errors(blocks: Tensor, scales: Tensor, moments: Tensor, bits: int) -> Tensor:
    """Squared error of each block's products, summed over tokens, ``[out, blocks]``."""
    difference = rounded(blocks, scales, bits).sub_(blocks).transpose(0, 1)
    return (difference @ moments).mul_(difference).sum(-1).T
