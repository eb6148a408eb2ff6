"""Gaussian segments in PyTorch: one norm per token and head, codes that index Lloyd-Max levels of N(0, 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.constants import gaussian_boundaries, gaussian_levels
from minicache_trt.compression.float16 import saturate_float16
from minicache_trt.compression.segment import GAUSSIAN
from minicache_trt.contract import SegmentLayout


def _table(bits: int, boundaries: bool, device: torch.device) -> Tensor:
    numbers = gaussian_boundaries(bits) if boundaries else gaussian_levels(bits)
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def standardize(segments: tuple[SegmentLayout, ...], z: Tensor) -> tuple[Tensor, Tensor]:
    """Divide by the root mean square of the stored components.

    Parameters
    ----------
    segments : tuple of SegmentLayout
        Of a stream with gaussian segments; those of other kinds are not stored.
    z : Tensor
        ``[N, H, B, rank]`` float32, already divided by its deviations.

    Returns
    -------
    u : Tensor
        Like ``z``, divided by the stored norm; zero where that is zero.
    norm : Tensor
        ``[N, H, B]`` float16.
    """
    stored = [
        z[..., part.component : part.component + part.segment.length]
        for part in segments
        if part.segment.kind == GAUSSIAN
    ]
    count = sum(part.shape[-1] for part in stored)
    square = sum((part.square().sum(-1) for part in stored[1:]), stored[0].square().sum(-1))
    norm = saturate_float16((square / count).sqrt())
    divisor = norm.float().unsqueeze(-1)
    return torch.where(divisor > 0, z / divisor, torch.zeros_like(z)), norm


def quantize(u: Tensor, norm: Tensor, bits: int) -> Tensor:
    """Codes int32 like ``u``: how many boundaries are strictly below it; 0 where the token's norm is 0."""
    codes = torch.bucketize(u.contiguous(), _table(bits, True, u.device), out_int32=True)
    return codes.masked_fill(norm.unsqueeze(-1) == 0, 0)


def dequantize(codes: Tensor, norm: Tensor, bits: int) -> Tensor:
    """Levels times norm, float32."""
    return _table(bits, False, codes.device)[codes.long()] * norm.float().unsqueeze(-1)
