"""Rounding ties: taking another implementation's side where both sides are right.

Two correct implementations differ in the last bits of float32 and now and then land on different sides of a rounding or
retention boundary; from there on their logits differ by a whole quantization step. To compare logits all the same, the
reference can adopt what an engine stored, after checking that each adopted difference lies at its boundary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicache_trt.compression.segment import DROPPED, GAUSSIAN, MODEL
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import StreamLayout
from minicache_trt.reference.codec import EncodedBlocks, encode, read_exact
from minicache_trt.reference.distances import code_distances, component_noise, range_slack, score_noise
from minicache_trt.reference.retention import rankings, retained_mask
from minicache_trt.reference.segments import EncodedSegment, with_codes
from minicache_trt.reference.stored import Stored, stored_segment, stored_vectors

__all__ = ["TOLERANCE", "Stored", "Ties", "adopt"]

TOLERANCE = 1e-3
"""Farthest a differing decision may lie from its boundary, in quantization steps or in units of the retention score."""


@dataclass
class Ties:
    """Differences between an engine's stored blocks and the reference's.

    Parameters
    ----------
    codes, retained : int
        Codes and retained positions compared.
    differing_codes, differing_retained : int
    uncertain_codes : float
        Codes likely to differ because float32 leaves open where a number lies: each code counts by the part of its
        quantization step that is noise, both ways, noise being a sixteenth of its bound. Next to nothing unless
        ranges are themselves near the noise, as of residuals of a layer that is all but the merged one.
    farthest : float
        Largest distance of a differing decision from its boundary, less what float32 leaves uncertain (see
        `distances`).
    disagreements : int
        Decisions farther than `TOLERANCE` from their boundary, malformed lists of retained positions, ranges and norms
        that are neither equal nor neighbouring float16 numbers (and move a code by more than `TOLERANCE` steps), exact
        and unquantized numbers that differ: errors, not ties.
    """

    codes: int = 0
    retained: int = 0
    differing_codes: int = 0
    differing_retained: int = 0
    uncertain_codes: float = 0.0
    farthest: float = 0.0
    disagreements: int = 0

    def add(self, other: Ties) -> None:
        """Add another count to this one."""
        self.codes += other.codes
        self.retained += other.retained
        self.differing_codes += other.differing_codes
        self.differing_retained += other.differing_retained
        self.uncertain_codes += other.uncertain_codes
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
        self.disagreements += int((~(apart <= 2.0**-10 * other.float().abs() + 2.0**-24 + slack)).sum())

    def close(self, mine: Tensor, other: Tensor) -> None:
        """Count numbers that differ by more than `TOLERANCE` of the largest."""
        limit = TOLERANCE * other.float().abs().amax() if other.numel() else 0.0
        self.disagreements += int((~((mine.float() - other.float()).abs() <= limit)).sum())


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
    own = _adopt_retained(x, encoded, stored, ties)
    noise = component_noise(x, own)
    own = _adopt_norms(own, noise, stored, ties)
    index = own.retained_index.expand(*own.latent.shape[:2], -1)
    excluded = retained_mask(index, BLOCK_SIZE)
    norm = own.norms[:, 0] if own.stream.gaussian and own.norms is not None else None
    segments = []
    for part, mine in zip(layout.segments, own.segments, strict=True):
        theirs = stored_segment(part, mine, stored)
        segments.append(_adopt_numbers(mine, theirs, excluded, norm, noise, ties))
    result = replace(own, segments=tuple(segments))
    if own.residual is not None:
        theirs = stored_vectors("residual", own.residual, stored)
        everything = torch.zeros(own.residual.components.shape[:-1], dtype=torch.bool)
        residual = _adopt_numbers(own.residual, theirs, everything, None, noise[:, None], ties)
        result = replace(result, residual=residual)
    if own.stream.retained:
        numbers = _adopt_exact(own.exact_numbers, index, stored, ties)
        result = replace(result, exact_numbers=numbers, exact=read_exact(numbers))
    return result


def _adopt_retained(x: Tensor, encoded: EncodedBlocks, stored: Stored, ties: Ties) -> EncodedBlocks:
    """``encoded``, encoded again with the engine's retained tokens where they differ.

    A malformed list of positions is counted and not adopted.
    """
    stream = encoded.stream
    if not stream.retained:
        return encoded
    index = torch.from_numpy(np.asarray(stored["retained_index"]).astype(np.int64))[None]
    ties.retained += index.numel()
    if torch.equal(index, encoded.retained_index):
        return encoded
    malformed = sum(not _is_ascending(row) for row in index[0].tolist())
    ties.disagreements += malformed
    if malformed:
        return encoded
    ranked = rankings(encoded.score, encoded.meaningful, encoded.block_index, stream)[0]
    for ranking, noise, row in zip(ranked, score_noise(x, encoded)[0], index[0].tolist(), strict=True):
        chosen = [position for position in row if position >= 0]
        ties.differing_retained += len(set(chosen) ^ set(ranking.kept))
        compared = [*chosen, *ranking.qualified[: stream.retained + 1]]
        slack = 2 * float(noise[compared].amax()) if compared else 0.0  # both scores that a decision compares
        distances = torch.tensor(ranking.distances(chosen), dtype=torch.float64)
        ties.decide((distances - slack).clamp(min=0.0))
    return encode(x, encoded.block_index, stream, encoded.model_dtype, encoded.constants, index)


def _is_ascending(row: list[int]) -> bool:
    """Whether a list of positions is ascending and in the block, with nothing but -1 after the used ones."""
    used = [position for position in row if position != -1]
    padded = used + [-1] * (len(row) - len(used))
    return row == padded and used == sorted(set(used)) and all(0 <= position < BLOCK_SIZE for position in used)


def _adopt_norms(own: EncodedBlocks, noise: Tensor, stored: Stored, ties: Ties) -> EncodedBlocks:
    """Norms of slerp, or of gaussian components, whose codes then follow from the engine's norm."""
    if own.norms is None:
        return own
    norms = torch.from_numpy(np.asarray(stored["norms"]))[None]
    slack: Tensor = TOLERANCE * 2.0**-4 * own.norms.float().abs()
    if own.stream.gaussian:
        inverse = 1.0 if own.constants.sigma is None else (1 / own.constants.sigma.amin(dim=-1))[:, None]
        slack = (noise * inverse)[:, None]
    ties.neighbours(norms, own.norms, slack)
    return replace(own, norms=norms)


def _adopt_numbers(
    own: EncodedSegment, theirs: EncodedSegment, excluded: Tensor, norm: Tensor | None, noise: Tensor, ties: Ties
) -> EncodedSegment:
    """Judge one segment's stored numbers.

    Where a range was rounded the other way, codes may differ from the reference's own without being near a boundary of
    its grid; they are judged on the grid that was stored with them.

    Parameters
    ----------
    excluded : Tensor
        bool ``[..., B]``: retained tokens.
    noise : Tensor
        ``[..., B]``: what float32 arithmetic leaves uncertain about the components, in their own units.
    """
    if own.segment.kind == DROPPED:
        return own
    if own.segment.kind == MODEL:
        assert own.values is not None and theirs.values is not None
        ties.close(theirs.values, own.values)
        return own
    assert own.codes is not None and theirs.codes is not None
    if own.segment.kind != GAUSSIAN:
        for mine, other, slack in range_slack(own, theirs, noise, TOLERANCE):
            ties.neighbours(other, mine, slack)
    regridded = with_codes(theirs, excluded, norm)
    distance, blur = code_distances(regridded, theirs.codes, norm, noise)
    if own.segment.axis == "channel" and own.segment.has_ranges:
        zero = torch.where(theirs.codes == 0, 0.0, math.inf).to(distance.dtype)
        distance = torch.where(excluded[..., None], zero, distance)
    ties.codes += own.codes.numel()
    ties.differing_codes += int((theirs.codes != own.codes).sum())
    ties.uncertain_codes += float((blur / 8).clamp(max=1.0).sum())
    ties.decide(distance.flatten())
    return replace(regridded, codes=theirs.codes)


def _adopt_exact(own: EncodedSegment, index: Tensor, stored: Stored, ties: Ties) -> EncodedSegment:
    """Judge retained vectors ``[1, m, H, R, D]``; what unused slots hold does not matter."""
    theirs = stored_vectors("exact", own, stored)
    used = (index >= 0)[:, None].expand(own.components.shape[:-1])
    fields: dict[str, Any] = {}
    for name in ("values", "codes", "scale", "minimum"):
        mine, other = getattr(own, name), getattr(theirs, name)
        if mine is not None:
            mask = used[..., None] if mine.dim() > used.dim() else used
            fields[name] = torch.where(mask, other.to(mine.dtype), mine)
    everything, noise = torch.zeros_like(used), torch.zeros(used.shape)
    return _adopt_numbers(own, replace(theirs, **fields), everything, None, noise, ties)
