"""Linear maps between a layer's heads and its stream's latent vectors: calibrated once, applied to queries and sums.

With rows as vectors, A_i the alignment, E and Dec the merge's matrices, S the deviations and T the transform of the
stored components (everything but T is the identity where a stream has none)::

    writing (linear)   y = sum_i x_i W_i - b          W_i = A_i E_i S^-1 T        b = mean E S^-1 T
    reading            x_i = y P_i^T + c_i            P_i = A_i Dec_i^T S T       c_i = mean_i A_i^T
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from minicache_trt.compression.matrices import Matrices
from minicache_trt.compression.segment import DROPPED, Segment
from minicache_trt.compression.transforms import transform
from minicache_trt.contract import StreamLayout

Arrays = dict[str, NDArray[np.generic]]


def stored_transform(segments: tuple[Segment, ...]) -> NDArray[np.float64] | None:
    """T, from all components to the stored ones ``[r, stored]``; None for the identity."""
    rank = sum(segment.length for segment in segments)
    columns, start = [], 0
    for segment in segments:
        part = np.zeros((rank, segment.length))
        identity = torch.eye(segment.length, dtype=torch.float64)
        part[start : start + segment.length] = transform(segment, identity).numpy()
        if segment.kind != DROPPED:
            columns.append(part)
        start += segment.length
    matrix = np.concatenate(columns, 1)
    return None if matrix.shape == (rank, rank) and (matrix == np.eye(rank)).all() else matrix


def read_maps(layout: StreamLayout, matrices: Matrices, member: int) -> Arrays:
    """What reading one layer of a stream takes, by `StreamMaps`' names; absent where it is the identity.

    ``map``: P_i, ``[H or 1, D, stored]``. ``residual_map``: A_i, ``[H, D, D]``. ``offset``: c_i, ``[H, 1, D]``.
    ``heads``: KV head of each slot; ``slots``: slot of each KV head; int64 ``[H]``.
    """
    stream, dim = layout.stream, layout.config.head_dim
    result: Arrays = {}
    align = matrices["align"][member].astype(np.float64) if stream.align else np.eye(dim)[None]
    latent = stored_transform(stream.segments)
    matrix = align
    if stream.merge == "linear":
        own = slice(member * dim, (member + 1) * dim)
        decode = matrices["decode"][:, :, own].astype(np.float64)
        if stream.gaussian:
            decode = decode * matrices["sigma"].astype(np.float64)[:, :, None]
        matrix = align @ decode.swapaxes(1, 2)
        mean = matrices["mean"][:, None, own].astype(np.float64)
        result["offset"] = (mean @ align.swapaxes(1, 2)).astype(np.float32)
    if latent is not None:
        matrix = matrix @ latent
    if stream.merge == "linear" or stream.align or latent is not None:
        result["map"] = matrix.astype(np.float32)
    if stream.align and layout.residual:
        result["residual_map"] = align.astype(np.float32)
    if stream.match_heads:
        heads = matrices["head_map"][member].astype(np.int64)
        result["heads"], result["slots"] = heads, np.argsort(heads)
    return result


def write_maps(layout: StreamLayout, matrices: Matrices) -> Arrays:
    """What compressing a stream takes.

    ``transform``: T ``[r, stored]`` of merges that are not linear. ``align``: ``[m, H, D, D]``. ``encode``: W_i,
    ``[m, H, D, stored]``; ``bias``: b, ``[H, 1, stored]``. ``heads``: int64 ``[m, H]``.
    """
    stream, dim = layout.stream, layout.config.head_dim
    result: Arrays = {}
    latent = stored_transform(stream.segments)
    if stream.match_heads:
        result["heads"] = matrices["head_map"].astype(np.int64)
    if stream.merge != "linear":
        if stream.align:
            result["align"] = matrices["align"].astype(np.float32)
        if latent is not None:
            result["transform"] = latent.astype(np.float32)
        return result
    members, heads = len(stream.layers), layout.config.num_kv_heads
    encode = matrices["encode"].astype(np.float64)
    if stream.gaussian:
        encode = encode / matrices["sigma"].astype(np.float64)[:, None, :]
    if latent is not None:
        encode = encode @ latent
    result["bias"] = (matrices["mean"].astype(np.float64)[:, None] @ encode).astype(np.float32)
    split = encode.reshape(heads, members, dim, -1).swapaxes(0, 1)
    if stream.align:
        split = matrices["align"].astype(np.float64) @ split
    result["encode"] = np.ascontiguousarray(split, np.float32)
    return result


@dataclass(frozen=True)
class StreamMaps:
    """Graph values of `read_maps`; None where there is nothing to apply."""

    map: ir.Value | None = None
    residual_map: ir.Value | None = None
    offset: ir.Value | None = None
    heads: ir.Value | None = None
    slots: ir.Value | None = None
