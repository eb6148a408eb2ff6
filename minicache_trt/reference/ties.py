"""Rounding ties: taking another implementation's side where both sides are right.

Two correct implementations differ in the last bits of float32 and now and then land on different sides of a rounding or
retention boundary; from there on their logits differ by a whole quantization step. To compare logits all the same, the
reference can adopt what an engine stored, after checking that each adopted difference lies at its boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import BYTE_OFFSET, SegmentLayout, StreamLayout
from minicache_trt.reference.codec import EncodedBlocks, EncodedSegment

TOLERANCE = 1e-3
"""Farthest a differing decision may lie from its boundary, in quantization steps or in units of the retention score."""

Stored = Mapping[str, NDArray[np.generic]]
"""One block of every pool of a stream, by the kind of the pool, in the contract's shapes."""


@dataclass
class Ties:
    """Differences between an engine's stored blocks and the reference's.

    Parameters
    ----------
    codes, retained : int
        Codes and retained positions compared.
    differing_codes, differing_retained : int
    farthest : float
        Largest distance of a differing decision from its boundary.
    disagreements : int
        Decisions farther than `TOLERANCE` from their boundary, ranges and norms that are neither equal nor
        neighbouring float16 numbers (and move a code by more than `TOLERANCE` steps), exact and unquantized numbers
        that differ: errors, not ties.
    """

    codes: int = 0
    retained: int = 0
    differing_codes: int = 0
    differing_retained: int = 0
    farthest: float = 0.0
    disagreements: int = 0

    def add(self, other: Ties) -> None:
        """Add another count to this one."""
        self.codes += other.codes
        self.retained += other.retained
        self.differing_codes += other.differing_codes
        self.differing_retained += other.differing_retained
        self.farthest = max(self.farthest, other.farthest)
        self.disagreements += other.disagreements

    def decide(self, distance: Tensor) -> None:
        """Count differing decisions by their distances from the boundary."""
        if distance.numel():
            self.farthest = max(self.farthest, float(distance.max()))
            self.disagreements += int((distance > TOLERANCE).sum())

    def neighbours(self, mine: Tensor, other: Tensor, slack: Tensor | float) -> None:
        """Count float16 numbers that are more than one float16 step and ``slack`` apart."""
        apart = (mine.float() - other.float()).abs()
        self.disagreements += int((apart > 2.0**-10 * other.float().abs() + 2.0**-24 + slack).sum())

    def close(self, mine: Tensor, other: Tensor) -> None:
        """Count numbers that differ by more than `TOLERANCE` of the largest."""
        limit = TOLERANCE * other.float().abs().amax() if other.numel() else 0.0
        self.disagreements += int(((mine.float() - other.float()).abs() > limit).sum())


def adopt(layout: StreamLayout, x: Tensor, encoded: EncodedBlocks, stored: Stored, ties: Ties) -> EncodedBlocks:
    """The reference's encoding of one block with an engine's decisions in place of its own.

    Parameters
    ----------
    layout : StreamLayout
    x : Tensor
        ``[m, 1, H, B, D]``, what was encoded.
    encoded : EncodedBlocks
        The reference's encoding of ``x``.
    stored : mapping
        What the engine stored.
    ties : Ties
        Counts are added here.
    """
    stream = layout.stream
    result = encoded
    same_tokens = torch.ones(encoded.score.shape[:2], dtype=torch.bool)
    if stream.retained:
        index = torch.from_numpy(stored["retained_index"].astype(np.int64))[None]
        same_tokens = (index == encoded.retained_index).all(-1)
        chosen = encoded.score.gather(-1, index)
        boundary = encoded.score.gather(-1, encoded.retained_index).amin(-1, keepdim=True)
        other = ~(index.unsqueeze(-1) == encoded.retained_index.unsqueeze(-2)).any(-1)
        ties.retained += index.numel()
        ties.differing_retained += int(other.sum())
        ties.decide((boundary - chosen)[other].clamp_min(0))
        ties.disagreements += int((index[..., 1:] <= index[..., :-1]).sum())
        gather = index.expand(-1, x.shape[2], -1)[..., None].expand(-1, -1, -1, x.shape[-1])
        exact = torch.stack([layer.gather(2, gather) for layer in x], dim=1)
        ties.close(torch.from_numpy(stored["exact"])[None], exact)
        result = replace(result, retained_index=index, exact=exact)
    if encoded.norms is not None:
        norms = torch.from_numpy(stored["norms"])[None]
        ties.neighbours(norms, encoded.norms, TOLERANCE * 2.0**-4 * encoded.norms.float().abs())
        result = replace(result, norms=norms)
    kept = torch.zeros(encoded.latent.shape[:3], dtype=torch.bool)
    if stream.retained:
        mask = torch.zeros(encoded.score.shape, dtype=torch.bool).scatter_(-1, result.retained_index, True)
        kept = mask.expand(-1, kept.shape[1], -1)
    comparable = same_tokens.expand(-1, kept.shape[1])
    segments = []
    for part, own in zip(layout.segments, encoded.segments, strict=True):
        if own.values is not None:
            mine = stored["latent"][..., part.storage : part.storage + part.segment.length]
            ties.close(torch.from_numpy(mine)[None], own.values)
            segments.append(own)
        else:
            segments.append(_adopt_segment(part, own, encoded.latent, kept, comparable, stored, ties))
    return replace(result, segments=tuple(segments))


def _adopt_segment(
    part: SegmentLayout,
    own: EncodedSegment,
    latent: Tensor,
    kept: Tensor,
    comparable: Tensor,
    stored: Stored,
    ties: Ties,
) -> EncodedSegment:
    """``kept [1, H, B]``: retained tokens; ``comparable [1, H]``: heads where both sides retain the same ones."""
    segment = part.segment
    assert own.codes is not None and own.scale is not None and own.minimum is not None
    count = part.minimum - part.scale
    params = torch.from_numpy(stored["params"])[None]
    scale, minimum = params[..., part.scale : part.scale + count], params[..., part.minimum : part.minimum + count]
    channel = segment.axis == "channel"
    heads = comparable if channel else torch.ones_like(comparable)
    # What a range may be off by: as much as moves a code by TOLERANCE steps.
    slack = TOLERANCE * own.scale[heads].float()
    ties.neighbours(scale[heads], own.scale[heads], slack / (2**segment.bits - 1))
    ties.neighbours(minimum[heads], own.minimum[heads], slack)
    size = segment.length * segment.bits // 8
    data = stored["codes"][..., part.storage : part.storage + size].astype(np.int64) + BYTE_OFFSET
    digits = [(data >> (segment.bits * i)) & (2**segment.bits - 1) for i in range(8 // segment.bits)]
    codes = torch.from_numpy(np.stack(digits, -1).reshape(1, *data.shape[:2], segment.length))
    axis = 2 if channel else 3
    step = scale.float().unsqueeze(axis)
    y = latent[..., part.component : part.component + segment.length]
    grid = ((y - minimum.float().unsqueeze(axis)) / torch.where(step > 0, step, 1.0)).clamp(0, 2**segment.bits - 1)
    grid = torch.where(step > 0, grid, 0.0)
    if channel:
        grid = grid.masked_fill(kept.unsqueeze(-1), 0.0)
    ties.codes += codes.numel()
    ties.differing_codes += int((codes != own.codes).sum())
    ties.decide(((grid - codes).abs() - 0.5).clamp_min(0).flatten())
    # Where a scale was rounded the other way, codes may differ from the reference's own without being near a boundary
    # of its grid; they are judged on the grid that was stored with them.
    assert codes.shape[2] == BLOCK_SIZE
    return replace(own, scale=scale, minimum=minimum, codes=codes.to(own.codes.dtype))
