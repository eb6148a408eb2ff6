"""Segments in their formats: runs of components, transformed, then stored as they are or as codes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minicache_trt.compression.segment import DROPPED, FLOAT8, GAUSSIAN, INTEGER, MODEL, Segment
from minicache_trt.reference.gaussian import lloyd_max_levels, midpoints
from minicache_trt.reference.transforms import apply_transform

FLOAT8_LARGEST = 448.0
"""Largest e4m3 number."""


@dataclass(frozen=True)
class EncodedSegment:
    """One run of vectors ``[..., B, length]``: a segment of the latent vector (``start : start + length``), residuals
    or retained vectors.

    Parameters
    ----------
    components : Tensor
        float32 ``[..., B, length]``: the numbers to be stored, after the transform; gaussian: also divided by sigma
        (before the transform), not yet by the norm. Not stored.
    values : Tensor or None
        Format ``model``: ``components`` in the compute type; otherwise None, as are the fields below for ``model`` and
        ``drop``.
    scale, minimum : Tensor or None
        float16, ``[..., B]`` for axis ``token``, ``[..., length]`` for axis ``channel``. ``fp8`` has no minimum,
        gaussian segments have neither.
    grid : Tensor or None
        float32 ``[..., B, length]``: what is rounded to a code. Integers: (y - minimum) / scale before rounding and
        clamping; ``fp8``: y / scale; both 0 where scale is 0; gaussian: components over norm.
    codes : Tensor or None
        uint8 ``[..., B, length]``, one code per element, 0 to 2**bits - 1; ``fp8``: the byte of the e4m3 number.
    """

    segment: Segment
    start: int
    components: Tensor
    values: Tensor | None = None
    scale: Tensor | None = None
    minimum: Tensor | None = None
    grid: Tensor | None = None
    codes: Tensor | None = None


def saturate_float16(x: Tensor) -> Tensor:
    """Round to float16; what would be infinite becomes the largest finite number."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).to(torch.float16)


def encode_segment(
    y: Tensor, segment: Segment, start: int, excluded: Tensor, model_dtype: torch.dtype, norm: Tensor | None = None
) -> EncodedSegment:
    """Store ``y [..., B, length]``.

    Parameters
    ----------
    excluded : Tensor
        bool ``[..., B]``: retained tokens, outside channel ranges.
    model_dtype : torch.dtype
        Compute type.
    norm : Tensor or None
        Gaussian segments, whose ``y`` is already divided by sigma: float16 ``[..., B]``.
    """
    own = EncodedSegment(segment, start, apply_transform(y, segment.transform).to(torch.float32))
    if segment.kind == MODEL:
        return replace(own, values=own.components.to(model_dtype))
    if segment.kind == DROPPED:
        return own
    if segment.kind in (INTEGER, FLOAT8):
        own = _with_ranges(own, excluded)
    return with_codes(own, excluded, norm)


def decode_segment(own: EncodedSegment, norm: Tensor | None = None) -> Tensor:
    """float64 ``[..., B, length]`` as ``y`` in `encode_segment`, read from the stored fields only."""
    segment = own.segment
    if segment.kind == DROPPED:
        return torch.zeros_like(own.components, dtype=torch.float64)
    if segment.kind == MODEL:
        read = _present(own.values, "values").to(torch.float64)
    elif segment.kind == GAUSSIAN:
        levels = torch.tensor(lloyd_max_levels(segment.bits), dtype=torch.float64)
        read = levels[_present(own.codes, "codes").long()] * _present(norm, "norm").to(torch.float64)[..., None]
    else:
        codes = _present(own.codes, "codes")
        numbers = float8_numbers()[codes.long()] if segment.kind == FLOAT8 else codes.to(torch.float64)
        read = _spread(_present(own.scale, "scale"), segment).to(torch.float64) * numbers
        if own.minimum is not None:
            read = read + _spread(own.minimum, segment).to(torch.float64)
    return apply_transform(read, segment.transform)


def with_codes(own: EncodedSegment, excluded: Tensor, norm: Tensor | None) -> EncodedSegment:
    """``own`` with the grid and codes that follow from its components and its ranges, or from ``norm``.

    Quantizer arithmetic is float32.
    """
    segment, y = own.segment, own.components
    if segment.kind == GAUSSIAN:
        size = _present(norm, "norm").to(torch.float32)[..., None]
        grid = torch.where(size > 0, y / size, -math.inf)
        boundaries = torch.tensor(midpoints(lloyd_max_levels(segment.bits)), dtype=torch.float32)
        return replace(own, grid=grid, codes=(grid[..., None] > boundaries).sum(dim=-1).to(torch.uint8))
    step = _spread(_present(own.scale, "scale"), segment)
    if segment.kind == FLOAT8:
        grid = torch.where(step > 0, y / step, 0.0)
        near = grid.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        codes = torch.where(step > 0, near, 0)
    else:
        grid = torch.where(step > 0, (y - _spread(_present(own.minimum, "minimum"), segment)) / step, 0.0)
        codes = grid.round().clamp(0, 2**segment.bits - 1).to(torch.uint8)
    if segment.axis == "channel":
        codes = codes.masked_fill(excluded[..., None], 0)
    return replace(own, grid=grid, codes=codes)


def float8_numbers() -> Tensor:
    """The 256 e4m3 numbers by their byte, float64: sign, 4 bits of exponent (bias 7), 3 of mantissa; NaN at the end."""
    numbers = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        size = math.nan if byte & 127 == 127 else size
        numbers.append(-size if byte & 128 else size)
    return torch.tensor(numbers, dtype=torch.float64)


def _with_ranges(own: EncodedSegment, excluded: Tensor) -> EncodedSegment:
    """``own`` with the scale, and for integers the minimum, of each token or channel."""
    segment, y = own.segment, own.components
    channel = segment.axis == "channel"
    dim = -2 if channel else -1
    outside = excluded[..., None] & torch.tensor(channel)
    if segment.kind == FLOAT8:
        return replace(own, scale=saturate_float16(y.abs().masked_fill(outside, 0.0).amax(dim=dim) / FLOAT8_LARGEST))
    low = y.masked_fill(outside, math.inf).amin(dim=dim)
    high = y.masked_fill(outside, -math.inf).amax(dim=dim)
    scale = saturate_float16((high - low) / (2**segment.bits - 1))
    return replace(own, scale=scale, minimum=saturate_float16(low))


def _spread(parameter: Tensor, segment: Segment) -> Tensor:
    """Stored scale or minimum as float32, shaped to broadcast over ``[..., B, length]``."""
    return parameter.to(torch.float32).unsqueeze(-2 if segment.axis == "channel" else -1)


def _present(field: Tensor | None, name: str) -> Tensor:
    if field is None:
        raise ValueError(f"segment: expected {name}, got None")
    return field
