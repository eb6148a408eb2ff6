"""`CompressBlocks` in PyTorch: the specification the ONNX function and the kernels are held to.

::

    x_1 .. x_m ──heads to slots──► un-rotate, align ──► merge ──► y ──transform, quantize each segment──► fields
                       └──────────────── retained tokens, as they are ─────────────────────────────────────►

A block's fields are tensors with the shapes of `minicache_trt.contract.StreamLayout`, with the number of blocks N in
front, keyed by the pool's kind. All arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression import gaussian, linear
from minicache_trt.compression.float16 import saturate_float16
from minicache_trt.compression.merge import merge_group
from minicache_trt.compression.packing import pack, unpack
from minicache_trt.compression.quantize import load, store
from minicache_trt.compression.retention import put_exact, retained_mask, retained_tokens, store_exact
from minicache_trt.compression.segment import DROPPED, GAUSSIAN, MODEL
from minicache_trt.compression.slots import heads_to_slots, into_basis, out_of_basis, slots_to_heads
from minicache_trt.compression.stream_constants import NO_CONSTANTS, StreamConstants
from minicache_trt.compression.transforms import transform
from minicache_trt.contract import SegmentLayout, StreamLayout

Fields = dict[str, Tensor]


def compress_blocks(
    layout: StreamLayout, x: Tensor, block_index: Tensor, constants: StreamConstants = NO_CONSTANTS
) -> Fields:
    """Compress full blocks of one stream.

    Parameters
    ----------
    layout : StreamLayout
    x : Tensor
        ``[m, N, H, B, D]``: the stream's keys (after RoPE) or values, one entry per layer of the group, compute type.
    block_index : Tensor
        ``[N]`` integer, the block's number within its sequence: its positions start at ``block_index * B``, and block
        0 holds the sinks.
    constants : StreamConstants
        The stream's matrices.

    Returns
    -------
    dict of Tensor
        A tensor ``[N, *shape]`` for every pool of the layout.
    """
    x = heads_to_slots(x, constants)
    merged = merge_group(layout.stream, into_basis(layout, x.float(), block_index, constants), constants)
    fields: Fields = {}
    retained = None
    if layout.stream.retained:
        assert merged.score is not None
        index = retained_tokens(layout.stream, merged.score, block_index)
        retained = retained_mask(index, x.shape[3])
        fields |= store_exact(layout, x, index)
    if merged.norms is not None:
        fields["norms"] = saturate_float16(merged.norms)
    if merged.residual is not None:
        assert layout.residual is not None
        fields["residual"], fields["residual_params"] = store(layout.residual, merged.residual)
    return fields | _store_latent(layout, merged.latent, retained, x.dtype, constants)


def _store_latent(
    layout: StreamLayout, latent: Tensor, retained: Tensor | None, dtype: torch.dtype, constants: StreamConstants
) -> Fields:
    """Fields of the segments of ``latent [N, H, B, rank]``."""
    norm = None
    fields: Fields = {}
    if layout.stream.gaussian:
        z = latent if constants.sigma is None else latent / constants.sigma[:, None]
        latent, norm = gaussian.standardize(layout.segments, z)
        fields["norms"] = norm.unsqueeze(1)
    runs: dict[str, list[Tensor]] = {"latent": [], "codes": [], "params": []}
    for part in layout.segments:
        segment = part.segment
        if segment.kind == DROPPED:
            continue
        y = transform(segment, latent[..., part.component : part.component + segment.length])
        if segment.kind == MODEL:
            runs["latent"].append(y.to(dtype))
        elif segment.kind == GAUSSIAN:
            assert norm is not None
            runs["codes"].append(pack(gaussian.quantize(y, norm, segment.bits), segment.bits))
        else:
            codes, ranges = store(segment, y, retained)
            runs["codes"].append(codes)
            runs["params"].append(ranges)
    return fields | {kind: torch.cat(parts, -1) for kind, parts in runs.items() if parts}


def restore_latent(layout: StreamLayout, fields: Fields) -> Tensor:
    """Latent vectors ``[N, H, B, rank]`` float32: dequantized, transforms undone, dropped segments zero.

    Those of gaussian segments are multiplied by the stored norm, not yet by ``sigma``.
    """
    parts = [_restore_segment(part, fields) for part in layout.segments]
    sample = next(part for part in parts if part is not None)
    lengths = [part.segment.length for part in layout.segments]
    return torch.cat(
        [sample.new_zeros(*sample.shape[:-1], n) if y is None else y for y, n in zip(parts, lengths, strict=True)], -1
    )


def _restore_segment(part: SegmentLayout, fields: Fields) -> Tensor | None:
    """``[N, H, B, length]`` float32, None for a dropped segment."""
    segment = part.segment
    if segment.kind == DROPPED:
        return None
    if segment.kind == MODEL:
        return transform(segment, fields["latent"][..., part.storage : part.storage + segment.length].float())
    packed = fields["codes"][..., part.storage : part.storage + segment.code_bytes]
    if segment.kind == GAUSSIAN:
        y = gaussian.dequantize(unpack(packed, segment.bits), fields["norms"][:, 0], segment.bits)
    else:
        count = part.ranges * (2 if segment.has_minimum else 1)
        y = load(segment, packed, fields["params"][..., part.scale : part.scale + count])
    return transform(segment, y)


def restore_blocks(
    layout: StreamLayout,
    fields: Fields,
    member: int,
    block_index: Tensor,
    constants: StreamConstants = NO_CONSTANTS,
) -> Tensor:
    """Keys (after RoPE) or values ``[N, H, B, D]`` of the group's layer number ``member``, float32.

    Retained tokens are as exact as their format; ``block_index`` and ``constants`` are those of `compress_blocks`.
    """
    stream = layout.stream
    x = restore_latent(layout, fields)
    if constants.sigma is not None:
        x = x * constants.sigma[:, None]
    if layout.residual is not None:
        x = x + load(layout.residual, fields["residual"][:, member], fields["residual_params"][:, member])
    if stream.merge == "slerp":
        x = x * fields["norms"][:, member].float().unsqueeze(-1)
    if stream.merge == "linear":
        x = linear.decode(x, member, layout.config.head_dim, constants)
    x = out_of_basis(layout, x, member, block_index, constants)
    if stream.retained:
        x = put_exact(layout, fields, member, x)
    return slots_to_heads(x, member, constants)
