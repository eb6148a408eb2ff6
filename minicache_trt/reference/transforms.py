"""Orthonormal transforms of a segment's components."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def hadamard_blocks(length: int) -> list[int]:
    """Sizes of the sub-blocks, each the largest power of two that fits in what is left: 80 is 64 + 16."""
    sizes = []
    while length:
        sizes.append(1 << (length.bit_length() - 1))
        length -= sizes[-1]
    return sizes


@cache
def hadamard(size: int) -> Tensor:
    """Orthonormal Walsh-Hadamard matrix, float64, in Sylvester order: the sign of (i, j) is (-1)^popcount(i & j)."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / size**0.5


def apply_transform(y: Tensor, transform: str) -> Tensor:
    """Transform ``[..., length]``; every transform is its own inverse.

    ``none`` returns ``y`` itself, ``hadamard`` float64.
    """
    if transform == "none":
        return y
    if transform == "hadamard":
        blocks = torch.split(y.to(torch.float64), hadamard_blocks(y.shape[-1]), dim=-1)
        return torch.cat([block @ hadamard(block.shape[-1]) for block in blocks], dim=-1)
    raise ValueError(f"transform: expected none or hadamard, got {transform!r}")
