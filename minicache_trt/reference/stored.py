"""Reading what an engine stored: one block of each of the contract's pools, as the reference's segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.compression.segment import MODEL, Segment
from minicache_trt.contract import BYTE_OFFSET, SegmentLayout
from minicache_trt.reference.segments import EncodedSegment

Stored = Mapping[str, NDArray[np.generic]]
"""One block of every pool of a stream, by the kind of the pool, in the contract's shapes."""


def stored_segment(part: SegmentLayout, own: EncodedSegment, stored: Stored) -> EncodedSegment:
    """``own`` with the stored numbers of a segment of the latent vector in place of its own."""
    segment, ranges = part.segment, part.ranges
    if segment.kind == MODEL:
        return replace(own, values=_pool(stored, "latent")[..., part.storage : part.storage + segment.length])
    if not segment.bits:
        return own
    codes = unpack(_pool(stored, "codes")[..., part.storage : part.storage + segment.code_bytes], segment)
    scale = minimum = None
    if segment.has_ranges:
        scale = _pool(stored, "params")[..., part.scale : part.scale + ranges]
    if segment.has_minimum:
        minimum = _pool(stored, "params")[..., part.minimum : part.minimum + ranges]
    return replace(own, scale=scale, minimum=minimum, codes=codes)


def stored_vectors(kind: str, own: EncodedSegment, stored: Stored) -> EncodedSegment:
    """``own`` with the stored numbers of the pools ``kind`` (``residual`` or ``exact``) in place of its own.

    Their ranges are per vector: a pool ``<kind>_params`` holds the scales of all vectors, then their minima.
    """
    if own.segment.kind == MODEL:
        return replace(own, values=_pool(stored, kind))
    params = _pool(stored, f"{kind}_params")
    count = own.components.shape[-2]
    minimum = params[..., count : 2 * count] if own.segment.has_minimum else None
    return replace(own, scale=params[..., :count], minimum=minimum, codes=unpack(_pool(stored, kind), own.segment))


def unpack(data: Tensor, segment: Segment) -> Tensor:
    """Codes of packed bytes: a stream of bits per vector, lowest first, each byte stored minus `BYTE_OFFSET`."""
    bytes_ = (data.numpy().astype(np.int64) + BYTE_OFFSET).astype(np.uint8)
    bits = np.unpackbits(bytes_, axis=-1, bitorder="little").reshape(*data.shape[:-1], segment.length, segment.bits)
    return torch.from_numpy((bits * 2 ** np.arange(segment.bits)).sum(axis=-1).astype(np.uint8))


def _pool(stored: Stored, kind: str) -> Tensor:
    """With an axis for the block in front."""
    return torch.from_numpy(np.asarray(stored[kind]))[None]
