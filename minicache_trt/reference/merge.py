"""Merging the layers of a group into one latent vector per token and head, and back.

Symbols: m layers, N blocks, H KV heads, B tokens per block, D head_dim, r rank; Hn = H, or 1 for norm "token".
Everything is computed in float64 and handed on in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from minicache_trt.compression.segment import DROPPED
from minicache_trt.compression.stream import Stream
from minicache_trt.reference.constants import Constants

SMALL_ANGLE = 1e-4
"""Below this many radians, slerp is linear interpolation followed by normalisation."""
ANTIPODAL_ANGLE = math.pi - 1e-3
"""Above this many radians, the merged direction is that of the last layer and the token is retained first."""
KARCHER_STEPS = 2
"""Refinements of the weighted mean of more than two directions."""
LARGEST_RELATIVE_ERROR = 4.0
"""Scores of linear merges saturate."""


@dataclass(frozen=True)
class Merged:
    """A group's layers, merged.

    Parameters
    ----------
    latent : Tensor
        float32 ``[N, H, B, r]``.
    score : Tensor
        float32 ``[N, Hn, B]``: what retention ranks by, see `EncodedBlocks`.
    meaningful : Tensor
        bool ``[N, Hn, B]``: false for zero vectors and antipodal directions, whose score is pi.
    norms : Tensor or None
        ``slerp``: float32 ``[N, m, Hn, B]``, not yet rounded.
    residual : Tensor or None
        ``slerp``: float32 ``[N, m, H, B, D]``, each layer's unit direction minus the merged one.
    """

    latent: Tensor
    score: Tensor
    meaningful: Tensor
    norms: Tensor | None = None
    residual: Tensor | None = None


def merge(x: Tensor, stream: Stream, constants: Constants) -> Merged:
    """Merge float64 ``x [m, N, H, B, D]``, slots in the stream's basis."""
    if stream.merge == "linear":
        return _linear(x, stream, constants)
    joined = join_heads(x) if stream.norm == "token" else x
    if stream.merge == "none":
        score = torch.zeros(joined.shape[1:4])
        return Merged(x[0].to(torch.float32), score, torch.ones_like(score, dtype=torch.bool))
    norms = joined.square().sum(dim=-1).sqrt()
    directions = torch.where(norms[..., None] > 0, joined / norms[..., None], 0.0)
    angle = _largest_angle(directions)
    meaningful = (angle <= ANTIPODAL_ANGLE) & (norms > 0).all(dim=0)
    weights = direction_weights(len(stream.layers), stream.t)
    if len(stream.layers) > 2:
        meaningful &= _weighted_sum(directions, weights).square().sum(dim=-1) > 0
    score = torch.where(meaningful, angle, math.pi).to(torch.float32)
    if stream.merge == "mean":
        return Merged(x.mean(dim=0).to(torch.float32), score, meaningful)
    if len(stream.layers) == 2:
        merged = _slerp(directions[0], directions[1], angle, stream.t)
    else:
        merged = karcher_mean(directions, weights)
    merged = torch.where(meaningful[..., None], merged, directions[-1])
    residual = directions - merged
    if stream.norm == "token":
        merged, residual = split_heads(merged, x.shape[2]), split_heads(residual, x.shape[2])
    return Merged(
        merged.to(torch.float32),
        score,
        meaningful,
        norms.transpose(0, 1).to(torch.float32),
        residual.transpose(0, 1).to(torch.float32),
    )


def unmerge(y: Tensor, norms: Tensor | None, residual: Tensor | None, stream: Stream, constants: Constants) -> Tensor:
    """Layers ``[m, N, H, B, D]`` in the stream's basis, float64, from what was read of the stored fields.

    The merged direction is not renormalised.
    """
    if stream.merge == "linear":
        return _decode(y, stream, constants)
    layers = torch.stack([y] * len(stream.layers))
    if stream.merge == "slerp":
        if norms is None:
            raise ValueError("norms: expected one per layer for merge 'slerp', got None")
        if residual is not None:
            layers = layers + residual.transpose(0, 1)
        layers = layers * norms.transpose(0, 1)[..., None]
    return layers


def direction_weights(members: int, t: float) -> list[float]:
    """Weights of the layers' directions, which add up to 1: proportional to t**i (1 - t)**(m - 1 - i)."""
    raw = [t**i * (1 - t) ** (members - 1 - i) for i in range(members)]
    return [weight / sum(raw) for weight in raw]


def karcher_mean(directions: Tensor, weights: list[float]) -> Tensor:
    """Weighted mean of unit vectors ``[m, ..., D]`` on the sphere, refined from their normalised weighted sum.

    Each step moves the mean along the weighted sum of the tangent vectors that lead from it to the directions.
    """
    mean = _weighted_sum(directions, weights)
    mean = mean / mean.square().sum(dim=-1, keepdim=True).sqrt()
    for _ in range(KARCHER_STEPS):
        tangent = _weighted_sum(torch.stack([_logarithm(mean, direction) for direction in directions]), weights)
        mean = _exponential(mean, tangent)
    return mean


def _logarithm(base: Tensor, direction: Tensor) -> Tensor:
    """Tangent vector at ``base`` that leads to ``direction``; its length is their angle."""
    cosine = (base * direction).sum(dim=-1, keepdim=True).clamp(-1, 1)
    angle = cosine.arccos()
    factor = torch.where(angle < SMALL_ANGLE, 1.0, angle / angle.sin())
    return factor * (direction - cosine * base)


def _exponential(base: Tensor, tangent: Tensor) -> Tensor:
    """End of the arc that leaves ``base`` along ``tangent`` and is as long."""
    length = tangent.square().sum(dim=-1, keepdim=True).sqrt()
    unit = torch.where(length > 0, tangent / length, 0.0)
    return length.cos() * base + length.sin() * unit


def _weighted_sum(directions: Tensor, weights: list[float]) -> Tensor:
    total = torch.zeros_like(directions[0])
    for direction, weight in zip(directions, weights, strict=True):
        total = total + weight * direction
    return total


def _largest_angle(directions: Tensor) -> Tensor:
    """Largest angle between any two of ``[m, ..., D]``."""
    pairs = combinations(directions, 2)
    angles = [(first * second).sum(dim=-1).clamp(-1, 1).arccos() for first, second in pairs]
    return torch.stack(angles).amax(dim=0)


def _slerp(first: Tensor, second: Tensor, angle: Tensor, t: float) -> Tensor:
    """Interpolate unit vectors; ``t`` is the weight of ``second``."""
    sine = angle.sin()
    weight_first = (((1 - t) * angle).sin() / sine)[..., None]
    weight_second = ((t * angle).sin() / sine)[..., None]
    spherical = weight_first * first + weight_second * second
    linear = (1 - t) * first + t * second
    linear = linear / linear.square().sum(dim=-1, keepdim=True).sqrt()
    return torch.where((angle < SMALL_ANGLE)[..., None], linear, spherical)


def _linear(x: Tensor, stream: Stream, constants: Constants) -> Merged:
    """y = ([x_1 .. x_m] - mean) encode; the score is the relative error of what is left without dropped segments."""
    if constants.encode is None or constants.mean is None:
        raise ValueError("constants: expected encode and mean for merge 'linear', got None")
    y = torch.einsum("nhbc,hcr->nhbr", side_by_side(x) - constants.mean[:, None], constants.encode)
    stored = torch.cat([torch.full((s.length,), float(s.kind != DROPPED)) for s in stream.segments])
    approximation = _decode(y * stored, stream, constants)
    if stream.norm == "token":
        x, approximation = join_heads(x), join_heads(approximation)
    size = x.square().sum(dim=(0, -1)).sqrt()
    error = (x - approximation).square().sum(dim=(0, -1)).sqrt()
    score = torch.where(size > 0, error / size, 0.0).clamp(max=LARGEST_RELATIVE_ERROR).to(torch.float32)
    return Merged(y.to(torch.float32), score, torch.ones_like(score, dtype=torch.bool))


def _decode(y: Tensor, stream: Stream, constants: Constants) -> Tensor:
    """[x_1 .. x_m] = y decode + mean, as ``[m, N, H, B, D]``."""
    if constants.decode is None or constants.mean is None:
        raise ValueError("constants: expected decode and mean for merge 'linear', got None")
    wide = torch.einsum("nhbr,hrc->nhbc", y.to(torch.float64), constants.decode) + constants.mean[:, None]
    return torch.stack(wide.chunk(len(stream.layers), dim=-1))


def side_by_side(x: Tensor) -> Tensor:
    """``[m, N, H, B, D]`` to ``[N, H, B, m * D]``."""
    return torch.cat(list(x), dim=-1)


def join_heads(x: Tensor) -> Tensor:
    """``[..., H, B, D]`` to ``[..., 1, B, H * D]``."""
    return x.transpose(-3, -2).flatten(-2).unsqueeze(-3)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[..., 1, B, H * D]`` to ``[..., H, B, D]``."""
    return x.squeeze(-3).reshape(*x.shape[:-3], x.shape[-2], heads, -1).transpose(-3, -2)
