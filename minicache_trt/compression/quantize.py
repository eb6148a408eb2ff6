"""Asymmetric quantization and bit packing in PyTorch.

Scale and minimum are rounded to float16 first, so that every implementation that reads them decides from the same
numbers: ``code = clamp(round_half_even((y - minimum) / scale))``, IEEE division, float32 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.constants import FLOAT16_MAX
from minicache_trt.compression.segment import Segment
from minicache_trt.contract import BYTE_OFFSET


def saturate_float16(x: Tensor) -> Tensor:
    """Round to float16; magnitudes above its range become its largest number."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)


def quantize(segment: Segment, y: Tensor, retained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and ranges of one segment.

    Parameters
    ----------
    segment : Segment
        A quantized one.
    y : Tensor
        ``[N, H, B, length]`` float32.
    retained : Tensor
        ``[N, H or 1, B]`` bool; with ``axis="channel"`` these tokens do not widen the range and their codes are 0.

    Returns
    -------
    codes : Tensor
        ``[N, H, B, length]`` int32 in [0, 2**bits - 1].
    scale, minimum : Tensor
        float16, ``[N, H, B]`` (``token``) or ``[N, H, length]`` (``channel``).
    """
    levels = 2**segment.bits - 1
    if segment.axis == "token":
        low, high, axis = y.amin(-1), y.amax(-1), -1
    else:
        skip = retained.unsqueeze(-1)
        low = y.masked_fill(skip, torch.inf).amin(2)
        high = y.masked_fill(skip, -torch.inf).amax(2)
        axis = 2
    scale, minimum = saturate_float16((high - low) / levels), saturate_float16(low)
    step = scale.float().unsqueeze(axis)
    ratio = (y - minimum.float().unsqueeze(axis)) / torch.where(step > 0, step, torch.ones_like(step))
    codes = torch.where(step > 0, ratio.round().clamp(0, levels), torch.zeros_like(ratio))
    if segment.axis == "channel":
        codes = codes.masked_fill(retained.unsqueeze(-1), 0)
    return codes.to(torch.int32), scale, minimum


def dequantize(segment: Segment, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """``scale * code + minimum`` in float32, shapes as `quantize` returns them."""
    axis = -1 if segment.axis == "token" else 2
    return codes.float() * scale.float().unsqueeze(axis) + minimum.float().unsqueeze(axis)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., length]`` into int8 ``[..., length * bits / 8]``: low bits first, byte minus `BYTE_OFFSET`."""
    per_byte = 8 // bits
    grouped = codes.reshape(*codes.shape[:-1], -1, per_byte)
    weights = torch.tensor([1 << (bits * i) for i in range(per_byte)], dtype=torch.int32, device=codes.device)
    return ((grouped * weights).sum(-1) - BYTE_OFFSET).to(torch.int8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: int8 ``[..., bytes]`` to int32 codes ``[..., bytes * 8 / bits]``."""
    value = packed.to(torch.int32) + BYTE_OFFSET
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device)
    return ((value.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
