"""Reference codec: full cache blocks of one stream to stored form and back.

::

    x [m, N, H, B, D] --merge--> y [N, H, B, D], norms [N, m, Hn, B]
                      --score--> retained_index [N, Hn, R], exact [N, m, H, R, D]
                      --split, quantize--> per segment: values, or scale, minimum and codes

Symbols: m layers of the group, N blocks, H KV heads, B tokens per block, D head_dim, R retained tokens per block;
Hn = H, or 1 for norm "token". All arithmetic is float32; scales, minima and norms are stored in float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.segment import MODEL, Segment
from minicache_trt.compression.stream import Stream

SMALL_ANGLE = 1e-4
"""Below this many radians, slerp is linear interpolation followed by normalisation."""
ANTIPODAL_ANGLE = math.pi - 1e-3
"""Above this many radians, the merged direction is that of the later layer and the token is retained first."""


@dataclass(frozen=True)
class EncodedSegment:
    """One segment of the latent vector; components ``start : start + segment.length``.

    Parameters
    ----------
    values : Tensor or None
        Format ``model``: the components in the compute type ``[N, H, B, length]``; otherwise None, as are the fields
        below for ``model``.
    scale, minimum : Tensor or None
        float16, ``[N, H, B]`` for axis ``token``, ``[N, H, length]`` for axis ``channel``.
    grid : Tensor or None
        float32 ``[N, H, B, length]``: (y - minimum) / scale before rounding and clamping, 0 where scale is 0. A code
        that differs between two implementations is a matter of rounding if ``grid`` is near a half.
    codes : Tensor or None
        uint8 ``[N, H, B, length]``, one code per element, 0 to 2**bits - 1.
    """

    segment: Segment
    start: int
    values: Tensor | None = None
    scale: Tensor | None = None
    minimum: Tensor | None = None
    grid: Tensor | None = None
    codes: Tensor | None = None


@dataclass(frozen=True)
class EncodedBlocks:
    """What a stream stores of N blocks, and what it takes to judge another implementation's choices.

    Parameters
    ----------
    block_index : Tensor
        int64 ``[N]``: number of each block within its sequence.
    latent : Tensor
        float32 ``[N, H, B, D]``: y before quantization (not stored).
    norms : Tensor or None
        float16 ``[N, m, Hn, B]`` for ``slerp``, None for other merges.
    score : Tensor
        float32 ``[N, Hn, B]``: what retention ranks by (not stored). The angle in radians, pi for antipodal pairs and
        zero vectors, infinity for sinks; zero for merge ``none``.
    retained_index : Tensor
        int64 ``[N, Hn, R]``: ascending positions in the block.
    exact : Tensor
        ``[N, m, H, R, D]`` in the compute type: every layer's vectors of the retained tokens.
    segments : tuple of EncodedSegment
        In the plan's order.
    """

    stream: Stream
    block_index: Tensor
    latent: Tensor
    norms: Tensor | None
    score: Tensor
    retained_index: Tensor
    exact: Tensor
    segments: tuple[EncodedSegment, ...]


def saturate_float16(x: Tensor) -> Tensor:
    """Round to float16; what would be infinite becomes the largest finite number."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).to(torch.float16)


def encode(x: Tensor, block_index: Tensor, stream: Stream, model_dtype: torch.dtype = torch.float32) -> EncodedBlocks:
    """Compress full blocks.

    Parameters
    ----------
    x : Tensor
        ``[m, N, H, B, D]``: keys after RoPE, or values, of the stream's layers.
    block_index : Tensor
        integers ``[N]``: number of each block within its sequence; block 0 holds the sinks.
    stream : Stream
        Merge, retention and formats.
    model_dtype : torch.dtype
        Compute type: of segments in format ``model`` and of retained vectors.

    Raises
    ------
    ValueError
        Shapes that do not fit the stream.
    """
    if x.dim() != 5 or x.shape[0] != len(stream.layers) or x.shape[4] != stream.rank:
        expected = f"[{len(stream.layers)}, N, H, B, {stream.rank}]"
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
    if block_index.shape != x.shape[1:2]:
        raise ValueError(f"block_index: expected shape [{x.shape[1]}], got {list(block_index.shape)}")
    x = x.to(torch.float32)
    latent, norms, score = _merge(x, stream)
    score = _sinks_first(score, block_index, stream.sink_tokens)
    retained_index = _largest(score, stream.retained)
    blocks, heads, tokens = latent.shape[:3]
    index = retained_index.expand(blocks, heads, stream.retained)
    excluded = torch.zeros(blocks, heads, tokens, dtype=torch.bool).scatter(2, index, True)
    segments, start = [], 0
    for segment in stream.segments:
        components = latent[..., start : start + segment.length]
        segments.append(_encode_segment(components, excluded, segment, start, model_dtype))
        start += segment.length
    return EncodedBlocks(
        stream=stream,
        block_index=block_index.to(torch.int64),
        latent=latent,
        norms=None if norms is None else saturate_float16(norms),
        score=score,
        retained_index=retained_index,
        exact=_gather_tokens(x.transpose(0, 1), index).to(model_dtype),
        segments=tuple(segments),
    )


def restore(encoded: EncodedBlocks) -> Tensor:
    """Rebuild every layer's vectors: float32 ``[m, N, H, B, D]``, retained tokens exact.

    The latent vector is not renormalised after dequantization.
    """
    y = torch.cat([_decode_segment(segment) for segment in encoded.segments], dim=-1)
    restored = y[:, None].repeat(1, len(encoded.stream.layers), 1, 1, 1)
    if encoded.norms is not None:
        restored = restored * encoded.norms.to(torch.float32)[..., None]
    blocks, layers, heads, _, size = restored.shape
    index = encoded.retained_index.expand(blocks, heads, encoded.stream.retained)
    index = index[:, None, :, :, None].expand(blocks, layers, heads, encoded.stream.retained, size)
    restored = restored.scatter(3, index, encoded.exact.to(torch.float32))
    return restored.transpose(0, 1)


def _merge(x: Tensor, stream: Stream) -> tuple[Tensor, Tensor | None, Tensor]:
    """Latent ``[N, H, B, D]``, norms ``[N, m, Hn, B]`` (slerp only) and retention score ``[N, Hn, B]``, all float32."""
    joined = _join_heads(x) if stream.norm == "token" else x
    if stream.merge == "none":
        return x[0], None, torch.zeros(joined.shape[1:4])
    norms = joined.square().sum(dim=-1).sqrt()
    directions = torch.where(norms[..., None] > 0, joined / norms[..., None], 0.0)
    angle = (directions[0] * directions[1]).sum(dim=-1).clamp(-1, 1).arccos()
    opposed = (angle > ANTIPODAL_ANGLE) | (norms == 0).any(dim=0)
    score = torch.where(opposed, math.pi, angle)
    if stream.merge == "mean":
        return (x[0] + x[1]) / 2, None, score
    merged = _slerp(directions[0], directions[1], angle, opposed, stream.t)
    latent = _split_heads(merged, x.shape[2]) if stream.norm == "token" else merged
    return latent, norms.transpose(0, 1), score


def _slerp(first: Tensor, second: Tensor, angle: Tensor, opposed: Tensor, t: float) -> Tensor:
    """Interpolate unit vectors; ``t`` is the weight of ``second``, which alone is kept where ``opposed``."""
    sine = angle.sin()
    weight_first = (((1 - t) * angle).sin() / sine)[..., None]
    weight_second = ((t * angle).sin() / sine)[..., None]
    spherical = weight_first * first + weight_second * second
    linear = (1 - t) * first + t * second
    linear = linear / linear.square().sum(dim=-1, keepdim=True).sqrt()
    merged = torch.where((angle < SMALL_ANGLE)[..., None], linear, spherical)
    return torch.where(opposed[..., None], second, merged)


def _join_heads(x: Tensor) -> Tensor:
    """``[..., H, B, D]`` to ``[..., 1, B, H * D]``."""
    return x.transpose(-3, -2).flatten(-2).unsqueeze(-3)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``[..., 1, B, H * D]`` to ``[..., H, B, D]``."""
    return x.squeeze(-3).reshape(*x.shape[:-3], x.shape[-2], heads, -1).transpose(-3, -2)


def _sinks_first(score: Tensor, block_index: Tensor, sink_tokens: int) -> Tensor:
    """Infinite score for the first ``sink_tokens`` positions of a sequence."""
    position = torch.arange(score.shape[2])
    sink = (block_index[:, None, None] == 0) & (position < sink_tokens)
    return torch.where(sink, math.inf, score)


def _largest(score: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest scores, ascending; ties go to the lower position."""
    ranked = score.sort(dim=-1, descending=True, stable=True).indices
    return ranked[..., :count].sort(dim=-1).values


def _gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index [N, H, R]`` of ``x [N, m, H, B, D]``: ``[N, m, H, R, D]``."""
    blocks, layers, heads, _, size = x.shape
    return x.gather(3, index[:, None, :, :, None].expand(blocks, layers, heads, index.shape[2], size))


def _encode_segment(
    y: Tensor, excluded: Tensor, segment: Segment, start: int, model_dtype: torch.dtype
) -> EncodedSegment:
    """Quantize ``y [N, H, B, length]``; ``excluded [N, H, B]`` marks retained tokens."""
    if segment.kind == MODEL:
        return EncodedSegment(segment, start, values=y.to(model_dtype))
    channel = segment.axis == "channel"
    if channel:
        low = y.masked_fill(excluded[..., None], math.inf).amin(dim=2)
        high = y.masked_fill(excluded[..., None], -math.inf).amax(dim=2)
    else:
        low, high = y.amin(dim=3), y.amax(dim=3)
    levels = 2**segment.bits - 1
    scale = saturate_float16((high - low) / levels)
    minimum = saturate_float16(low)
    step, offset = _over_tokens(scale, segment), _over_tokens(minimum, segment)
    grid = torch.where(step > 0, (y - offset) / step, 0.0)
    codes = grid.round().clamp(0, levels).to(torch.uint8)
    if channel:
        codes = codes.masked_fill(excluded[..., None], 0)
    return EncodedSegment(segment, start, scale=scale, minimum=minimum, grid=grid, codes=codes)


def _decode_segment(encoded: EncodedSegment) -> Tensor:
    """float32 ``[N, H, B, length]``."""
    if encoded.values is not None:
        return encoded.values.to(torch.float32)
    if encoded.scale is None or encoded.minimum is None or encoded.codes is None:
        raise ValueError("segment: expected values, or scale, minimum and codes, got neither")
    step, offset = _over_tokens(encoded.scale, encoded.segment), _over_tokens(encoded.minimum, encoded.segment)
    return step * encoded.codes.to(torch.float32) + offset


def _over_tokens(parameter: Tensor, segment: Segment) -> Tensor:
    """Stored scale or minimum as float32, shaped to broadcast over ``[N, H, B, length]``."""
    return parameter.to(torch.float32).unsqueeze(2 if segment.axis == "channel" else 3)
