"""Formats with ranges in PyTorch: integers with scale and minimum, float8 with a scale.

Scale and minimum are rounded to float16 first, so that every implementation that reads them decides from the same
numbers: ``code = clamp(round_half_even((y - minimum) / scale))``, IEEE division, float32 arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression import float8
from minicache_trt.compression.float16 import saturate_float16
from minicache_trt.compression.packing import pack, unpack
from minicache_trt.compression.segment import FLOAT8, Segment


def quantize(segment: Segment, y: Tensor, retained: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Codes and ranges of one segment.

    Parameters
    ----------
    segment : Segment
        One with ranges.
    y : Tensor
        ``[..., B, length]`` float32.
    retained : Tensor, optional
        ``[..., B]`` bool; with ``axis="channel"`` these tokens do not widen the range and their codes are 0.

    Returns
    -------
    codes : Tensor
        ``[..., B, length]`` int32 in [0, 2**bits - 1].
    ranges : list of Tensor
        Scale and minimum (``fp8``: scale only), float16 ``[..., B]`` (``token``) or ``[..., length]`` (``channel``).
    """
    axis = _axis(segment)
    skip = retained.unsqueeze(-1) if retained is not None and segment.axis == "channel" else None
    if segment.kind == FLOAT8:
        magnitude = y.abs() if skip is None else y.abs().masked_fill(skip, 0.0)
        codes, scale = float8.quantize(y, magnitude.amax(axis), axis)
        ranges = [scale]
    else:
        levels = 2**segment.bits - 1
        low = (y if skip is None else y.masked_fill(skip, torch.inf)).amin(axis)
        high = (y if skip is None else y.masked_fill(skip, -torch.inf)).amax(axis)
        ranges = [saturate_float16((high - low) / levels), saturate_float16(low)]
        step, minimum = (x.float().unsqueeze(axis) for x in ranges)
        ratio = (y - minimum) / torch.where(step > 0, step, torch.ones_like(step))
        codes = torch.where(step > 0, ratio.round().clamp(0, levels), torch.zeros_like(ratio)).to(torch.int32)
    return codes if skip is None else codes.masked_fill(skip, 0), ranges


def dequantize(segment: Segment, codes: Tensor, ranges: list[Tensor]) -> Tensor:
    """Numbers of codes in float32, shapes as `quantize` returns them: ``scale * code + minimum`` for integers."""
    axis = _axis(segment)
    if segment.kind == FLOAT8:
        return float8.dequantize(codes, ranges[0], axis)
    scale, minimum = (x.float().unsqueeze(axis) for x in ranges)
    return codes.float() * scale + minimum


def _axis(segment: Segment) -> int:
    """The axis a range spans: components of a token, or tokens of a channel."""
    return -1 if segment.axis == "token" else -2


def store(segment: Segment, y: Tensor, retained: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Packed codes int8 ``[..., B, bytes]`` and ranges float16 ``[..., numbers]``: scales, then minima."""
    codes, ranges = quantize(segment, y, retained)
    return pack(codes, segment.bits), torch.cat(ranges, -1)


def load(segment: Segment, packed: Tensor, ranges: Tensor) -> Tensor:
    """Inverse of `store`, float32 ``[..., B, length]``."""
    parts = ranges.chunk(2 if segment.has_minimum else 1, -1)
    return dequantize(segment, unpack(packed, segment.bits), list(parts))
