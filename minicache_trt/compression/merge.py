"""Cross-layer merges in PyTorch: from the vectors of a group of layers to one latent vector and back.

Source: MiniCache, arXiv 2405.14366, sections 3.2 and 3.3. All arithmetic is float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minicache_trt.compression.constants import ANTIPODAL_MARGIN, FIRST_SCORE, SMALL_ANGLE
from minicache_trt.compression.stream import Stream


def _granular(x: Tensor, norm: str) -> Tensor:
    """View ``[N, H, B, D]`` as ``[N, Hn, B, vector]``: one vector per head, or one over all heads."""
    if norm == "head":
        return x
    n, heads, block, dim = x.shape
    return x.permute(0, 2, 1, 3).reshape(n, 1, block, heads * dim)


def _per_head(x: Tensor, heads: int) -> Tensor:
    """Inverse of `_granular`."""
    if x.shape[1] == heads:
        return x
    n, _, block, size = x.shape
    return x.reshape(n, block, heads, size // heads).permute(0, 2, 1, 3)


def directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norm ``[..., 1]`` and unit direction of the last axis; the direction of a zero vector is zero."""
    norm = x.square().sum(-1, keepdim=True).sqrt()
    return norm, torch.where(norm > 0, x / norm, torch.zeros_like(x))


def pair_angle(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Angle ``[..., 1]`` between unit vectors in radians, and where it has no meaning (antipodal or zero vector)."""
    omega = (first * second).sum(-1, keepdim=True).clamp(-1.0, 1.0).acos()
    zero = (first.abs().amax(-1, keepdim=True) == 0) | (second.abs().amax(-1, keepdim=True) == 0)
    return omega, zero | (omega > math.pi - ANTIPODAL_MARGIN)


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Spherical interpolation of unit vectors ``[..., vector]``, ``t`` the weight of ``second``.

    Angles below `SMALL_ANGLE` are interpolated linearly and normalised; where the angle has no meaning the result is
    ``second`` (the paper leaves both cases open).
    """
    omega, meaningless = pair_angle(first, second)
    sine = omega.sin()
    safe = torch.where(sine > 0, sine, torch.ones_like(sine))
    curved = ((1 - t) * omega).sin() / safe * first + (t * omega).sin() / safe * second
    _, straight = directions((1 - t) * first + t * second)
    result = torch.where(omega < SMALL_ANGLE, straight, curved)
    return torch.where(meaningless, second, result)


def merge_group(stream: Stream, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Merge the layers of a group.

    Parameters
    ----------
    stream : Stream
    x : Tensor
        ``[m, N, H, B, D]`` float32, the group's layers.

    Returns
    -------
    latent : Tensor
        ``[N, H, B, D]``.
    norms : Tensor or None
        ``[N, m, Hn, B]``, ``slerp`` only.
    score : Tensor or None
        ``[N, Hn, B]``, retention score (larger is retained first); None for ``merge="none"``.
    """
    if stream.merge == "none":
        return x[0], None, None
    heads = x.shape[2]
    vectors = [_granular(layer, stream.norm) for layer in x]
    (norm0, unit0), (norm1, unit1) = directions(vectors[0]), directions(vectors[1])
    omega, meaningless = pair_angle(unit0, unit1)
    score = torch.where(meaningless, torch.full_like(omega, FIRST_SCORE), omega).squeeze(-1)
    if stream.merge == "mean":
        return (x[0] + x[1]) * 0.5, None, score
    latent = _per_head(slerp(unit0, unit1, stream.t), heads)
    return latent, torch.stack([norm0.squeeze(-1), norm1.squeeze(-1)], dim=1), score


def retained_tokens(stream: Stream, score: Tensor, block_index: Tensor) -> Tensor:
    """Offsets ``[N, Hn, R]`` int64, ascending, of the tokens a block keeps exactly.

    ``score`` is ``[N, Hn, B]``; ties go to the lower position; in block 0 of a sequence the sink tokens come first.
    """
    position = torch.arange(score.shape[-1], device=score.device)
    sink = (block_index[:, None, None] == 0) & (position < stream.sink_tokens)
    ranked = torch.sort(score + 2 * FIRST_SCORE * sink, dim=-1, descending=True, stable=True).indices
    return ranked[..., : stream.retained].sort(dim=-1).values
