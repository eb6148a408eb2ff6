"""Reference codec: full cache blocks of one stream to stored form and back.

::

    x [m, N, H, B, D] --un-rotate, match heads, align--> --merge--> y [N, H, B, r], norms [N, m, Hn, B], residuals
                      --score--> retained_index [N, Hn, R], exact [N, m, H, R, D]
                      --split, transform, quantize--> per segment: values, or codes with scale and minimum or a norm

Symbols: m layers of the group, N blocks, H KV heads, B tokens per block, D head_dim, r rank, R retained tokens per
block; Hn = H, or 1 for norm "token". Heads of everything that is stored are slots. Merges and transforms are computed
in float64, quantizers in float32; scales, minima and norms are stored in float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.segment import GAUSSIAN, Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.reference.constants import Constants
from minicache_trt.reference.merge import Merged, merge, unmerge
from minicache_trt.reference.retention import choose, gather_retained, override_retained, retained_mask
from minicache_trt.reference.segments import EncodedSegment, decode_segment, encode_segment, saturate_float16


@dataclass(frozen=True)
class EncodedBlocks:
    """What a stream stores of N blocks, and what it takes to judge another implementation's choices.

    Parameters
    ----------
    constants : Constants
    block_index : Tensor
        int64 ``[N]``: number of each block within its sequence.
    latent : Tensor
        float32 ``[N, H, B, r]``: y before transform and quantization (not stored).
    norms : Tensor or None
        float16 ``[N, m, Hn, B]`` for ``slerp``; ``[N, 1, H, B]`` with gaussian segments; otherwise None.
    score : Tensor
        float32 ``[N, Hn, B]``: what retention ranks by (not stored). ``slerp`` and ``mean``: the largest angle between
        two layers in radians, pi where it has no meaning; ``linear``: relative error; zero for ``none``.
    meaningful : Tensor
        bool ``[N, Hn, B]``: false for zero vectors and antipodal directions (not stored).
    retained_index : Tensor
        int64 ``[N, Hn, R]``: ascending positions in the block; unused slots, -1, last.
    exact : Tensor
        ``[N, m, H, R, D]``: every layer's vectors of the retained tokens as they are read, zeros in unused slots; in
        the compute type for ``retained_format`` model, otherwise float32.
    exact_numbers : EncodedSegment
        How they are stored, ``[N, m, H, R, D]``.
    residual : EncodedSegment or None
        ``[N, m, H, B, D]``.
    segments : tuple of EncodedSegment
        In the plan's order.
    model_dtype : torch.dtype
        The compute type.
    """

    stream: Stream
    constants: Constants
    block_index: Tensor
    latent: Tensor
    norms: Tensor | None
    score: Tensor
    meaningful: Tensor
    retained_index: Tensor
    exact: Tensor
    exact_numbers: EncodedSegment
    residual: EncodedSegment | None
    segments: tuple[EncodedSegment, ...]
    model_dtype: torch.dtype


def encode(
    x: Tensor,
    block_index: Tensor,
    stream: Stream,
    model_dtype: torch.dtype = torch.float32,
    constants: Constants | None = None,
    retained_index: Tensor | None = None,
) -> EncodedBlocks:
    """Compress full blocks.

    Parameters
    ----------
    x : Tensor
        ``[m, N, H, B, D]``: keys after RoPE, or values, of the stream's layers, in the model's order of heads.
    block_index : Tensor
        integers ``[N]``: number of each block within its sequence; block 0 holds the sinks.
    stream : Stream
        Merge, retention and formats.
    model_dtype : torch.dtype
        Compute type: of segments in format ``model`` and of retained vectors.
    constants : Constants, optional
        Matrices and frequencies, for streams that need them.
    retained_index : Tensor, optional
        int64 ``[N, Hn, R]``: retain these instead of what the rule chooses.

    Raises
    ------
    ValueError
        Shapes that do not fit the stream, or missing constants.
    """
    constants = Constants.of(stream, {}) if constants is None else constants
    _check_shapes(x, block_index, stream, constants)
    slots = constants.to_slots(x.to(torch.float32))
    merged = merge(constants.to_basis(slots, block_index), stream, constants)
    if retained_index is None:
        retained_index = choose(merged.score, merged.meaningful, block_index, stream)
    index = retained_index.expand(*merged.latent.shape[:2], stream.retained)
    exact = _vectors(gather_retained(slots.transpose(0, 1), index), stream.retained_format, model_dtype)
    residual = None
    if stream.residual != "none" and merged.residual is not None:
        residual = _vectors(merged.residual, stream.residual, model_dtype)
    norms = _norms(merged, stream, constants)
    return EncodedBlocks(
        stream=stream,
        constants=constants,
        block_index=block_index.to(torch.int64),
        latent=merged.latent,
        norms=norms,
        score=merged.score,
        meaningful=merged.meaningful,
        retained_index=retained_index,
        exact=read_exact(exact),
        exact_numbers=exact,
        residual=residual,
        segments=_segments(merged.latent, norms, retained_mask(index, BLOCK_SIZE), stream, constants, model_dtype),
        model_dtype=model_dtype,
    )


def restore(encoded: EncodedBlocks) -> Tensor:
    """Rebuild every layer's vectors from what is stored: float32 ``[m, N, H, B, D]``, heads in the model's order.

    Retained tokens are read from their own vectors, which are as the full tier holds them, after RoPE.
    """
    stream, constants = encoded.stream, encoded.constants
    gaussian_norm = encoded.norms[:, 0] if stream.gaussian and encoded.norms is not None else None
    y = torch.cat([decode_segment(segment, gaussian_norm) for segment in encoded.segments], dim=-1)
    if constants.sigma is not None:
        y = y * constants.sigma[:, None]
    norms = encoded.norms.to(torch.float64) if stream.merge == "slerp" and encoded.norms is not None else None
    residual = None if encoded.residual is None else decode_segment(encoded.residual)
    layers = unmerge(y, norms, residual, stream, constants)
    layers = constants.from_basis(layers, encoded.block_index)
    index = encoded.retained_index.expand(*y.shape[:2], stream.retained)
    layers = override_retained(layers.transpose(0, 1), index, encoded.exact).transpose(0, 1)
    return constants.from_slots(layers).to(torch.float32)


def read_exact(numbers: EncodedSegment) -> Tensor:
    """Retained vectors as they are read: `EncodedBlocks.exact`."""
    if numbers.values is not None:
        return numbers.values
    return decode_segment(numbers).to(torch.float32)


def _vectors(vectors: Tensor, name: str, model_dtype: torch.dtype) -> EncodedSegment:
    """Whole vectors ``[..., D]`` in format ``name``, each with its own range."""
    everything = torch.zeros(vectors.shape[:-1], dtype=torch.bool)
    return encode_segment(vectors, Segment(vectors.shape[-1], name), 0, everything, model_dtype)


def _norms(merged: Merged, stream: Stream, constants: Constants) -> Tensor | None:
    """Stored norms: of the layers (slerp), or the root mean square of the gaussian components over sigma."""
    if merged.norms is not None:
        return saturate_float16(merged.norms)
    if not stream.gaussian:
        return None
    parts = _split(_over_sigma(merged.latent, constants), stream)
    stored = [part for part, segment in zip(parts, stream.segments, strict=True) if segment.kind == GAUSSIAN]
    return saturate_float16(torch.cat(stored, dim=-1).square().mean(dim=-1).sqrt())[:, None]


def _segments(
    latent: Tensor,
    norms: Tensor | None,
    excluded: Tensor,
    stream: Stream,
    constants: Constants,
    model_dtype: torch.dtype,
) -> tuple[EncodedSegment, ...]:
    y = _over_sigma(latent, constants) if stream.gaussian else latent
    norm = norms[:, 0] if stream.gaussian and norms is not None else None
    result, start = [], 0
    for part, segment in zip(_split(y, stream), stream.segments, strict=True):
        result.append(encode_segment(part, segment, start, excluded, model_dtype, norm))
        start += segment.length
    return tuple(result)


def _over_sigma(latent: Tensor, constants: Constants) -> Tensor:
    """z = y / sigma, float64."""
    latent = latent.to(torch.float64)
    return latent if constants.sigma is None else latent / constants.sigma[:, None]


def _split(y: Tensor, stream: Stream) -> tuple[Tensor, ...]:
    return torch.split(y, [segment.length for segment in stream.segments], dim=-1)


def _check_shapes(x: Tensor, block_index: Tensor, stream: Stream, constants: Constants) -> None:
    linear = stream.merge == "linear" and constants.mean is not None
    size = constants.mean.shape[-1] // len(stream.layers) if linear and constants.mean is not None else stream.rank
    if x.dim() != 5 or x.shape[0] != len(stream.layers) or x.shape[3:] != (BLOCK_SIZE, size):
        expected = f"[{len(stream.layers)}, N, H, B, {size}]"
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
    if block_index.shape != x.shape[1:2]:
        raise ValueError(f"block_index: expected shape [{x.shape[1]}], got {list(block_index.shape)}")
