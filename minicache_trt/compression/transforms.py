"""Orthogonal transforms of a segment's components, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.segment import Segment


def hadamard_runs(length: int) -> list[int]:
    """Lengths of the consecutive runs a Walsh-Hadamard matrix covers: each the largest power of two that still fits."""
    runs: list[int] = []
    while length:
        runs.append(1 << (length.bit_length() - 1))
        length -= runs[-1]
    return runs


def walsh_hadamard(x: Tensor) -> Tensor:
    """Product of the last axis (a power of two) with the orthonormal Walsh-Hadamard matrix in Sylvester order."""
    size = x.shape[-1]
    flat, half = x.reshape(-1, size), 1
    while half < size:
        pairs = flat.view(-1, size // (2 * half), 2, half)
        flat = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).view(-1, size)
        half *= 2
    return (flat * size**-0.5).view(x.shape)


def transform(segment: Segment, y: Tensor) -> Tensor:
    """Apply the segment's transform to ``[..., length]``. Both transforms are symmetric, so this is its own inverse."""
    if segment.transform == "none":
        return y
    return torch.cat([walsh_hadamard(run) for run in torch.split(y, hadamard_runs(segment.length), -1)], -1)
