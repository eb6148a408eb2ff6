"""Cross-layer merges in PyTorch: from the vectors of a group of layers to one latent vector.

Source: MiniCache, arXiv 2405.14366, sections 3.2 and 3.3. All arithmetic is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression import linear
from minicache_trt.compression.constants import FIRST_SCORE
from minicache_trt.compression.spherical import directions, largest_angle, slerp, spherical_mean
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants


@dataclass(frozen=True)
class Merged:
    """A merged group.

    Parameters
    ----------
    latent : Tensor
        ``[N, H, B, rank]``.
    norms : Tensor, optional
        ``[N, m, Hn, B]``, ``slerp`` only.
    score : Tensor, optional
        ``[N, Hn, B]``, of streams that retain tokens: distance, `FIRST_SCORE` where it has no meaning.
    residual : Tensor, optional
        ``[N, m, H, B, D]``, of streams with a residual: each layer's direction minus the latent vector.
    """

    latent: Tensor
    norms: Tensor | None = None
    score: Tensor | None = None
    residual: Tensor | None = None


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


def merge_group(stream: Stream, x: Tensor, constants: StreamConstants) -> Merged:
    """Merge the layers of a group, ``x [m, N, H, B, D]`` float32, heads matched and aligned."""
    if stream.merge == "none":
        return Merged(x[0])
    if stream.merge == "linear":
        y = linear.encode(x, constants)
        return Merged(y, score=linear.relative_error(stream, x, y, constants) if stream.retained else None)
    norms, units = zip(*(directions(_granular(layer, stream.norm)) for layer in x), strict=True)
    omega, meaningless = largest_angle(list(units))
    if stream.merge == "mean":
        latent = (x[0] + x[1]) * 0.5 if len(x) == 2 else x.mean(0)
        return Merged(latent, score=_score(omega, meaningless))
    if len(units) == 2:
        direction = slerp(units[0], units[1], omega, meaningless, stream.t)
    else:
        direction, meaningless = spherical_mean(list(units), meaningless, stream.t)
    heads = x.shape[2]
    residual = None
    if stream.residual != "none":
        residual = torch.stack([_per_head(unit - direction, heads) for unit in units], 1)
    stacked = torch.stack([norm.squeeze(-1) for norm in norms], 1)
    return Merged(_per_head(direction, heads), stacked, _score(omega, meaningless), residual)


def _score(omega: Tensor, meaningless: Tensor) -> Tensor:
    return torch.where(meaningless, torch.full_like(omega, FIRST_SCORE), omega).squeeze(-1)
