"""How far another implementation's decisions lie from the boundary at which the reference would have decided alike."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minicache_trt.compression.segment import FLOAT8, GAUSSIAN
from minicache_trt.reference.codec import EncodedBlocks
from minicache_trt.reference.gaussian import lloyd_max_levels, midpoints
from minicache_trt.reference.segments import FLOAT8_LARGEST, EncodedSegment, float8_numbers

FLOAT32_NOISE = 2.0**-21
"""What float32 sums of a few hundred products are off by, relative to the norms of the vectors multiplied."""


def component_noise(x: Tensor, encoded: EncodedBlocks) -> Tensor:
    """Float32 uncertainty of the latent components, ``[N, H, B]``; it matters only where ranges are as small.

    Parameters
    ----------
    x : Tensor
        ``[m, N, H, B, D]``, what was encoded.
    """
    if encoded.stream.merge == "slerp":
        # Unit vectors; slerp divides by the sine of their angle.
        obtuse = encoded.score.clamp(min=math.pi / 2).to(torch.float64)
        return (FLOAT32_NOISE / obtuse.sin().clamp(min=1e-3)).expand(encoded.latent.shape[:3])
    vectors, mean = _squares(x, encoded)
    size = vectors.sqrt() + mean.sqrt()
    if encoded.constants.sigma is not None and encoded.stream.gaussian:
        size = size / encoded.constants.sigma.amin(dim=-1)[:, None]
    return FLOAT32_NOISE * size


def score_noise(x: Tensor, encoded: EncodedBlocks) -> Tensor:
    """Float32 uncertainty of retention scores, ``[N, Hn, B]``: of relative errors, where a mean is far larger than what
    lies around it. Angles have none beyond the tolerance.

    Parameters
    ----------
    x : Tensor
        ``[m, N, H, B, D]``, what was encoded.
    """
    if encoded.stream.merge != "linear":
        return torch.zeros(encoded.score.shape, dtype=torch.float64)
    vectors, mean = _squares(x, encoded)
    if encoded.score.shape[1] == 1:
        vectors, mean = vectors.sum(dim=1, keepdim=True), mean.sum(dim=1, keepdim=True)
    size = vectors.sqrt()
    return torch.where(size > 0, FLOAT32_NOISE * (size + mean.sqrt()) / size, 0.0)


def _squares(x: Tensor, encoded: EncodedBlocks) -> tuple[Tensor, Tensor]:
    """Squared norms of a slot's vectors, of all layers together, ``[N, H, B]``, and of its mean, ``[1, H, 1]``."""
    vectors = encoded.constants.to_slots(x.to(torch.float64)).square().sum(dim=(0, -1))
    mean = encoded.constants.mean
    if mean is None:
        return vectors, vectors.new_zeros(1, vectors.shape[1], 1)
    return vectors, mean.to(torch.float64).square().sum(dim=-1)[None, :, None]


def range_slack(
    own: EncodedSegment, theirs: EncodedSegment, noise: Tensor, tolerance: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of ranges, own and theirs, and what they may differ by beyond neighbouring float16 numbers.

    That is as much as moves a code by ``tolerance`` steps, or the components' noise.
    """
    assert own.scale is not None and theirs.scale is not None
    if own.segment.axis == "channel":
        noise = noise.amax(dim=-1, keepdim=True)
    scale = own.scale.float()
    if own.segment.kind == FLOAT8:
        yield own.scale, theirs.scale, tolerance * scale * 2.0**-4 + noise / FLOAT8_LARGEST
        return
    levels = 2**own.segment.bits - 1
    yield own.scale, theirs.scale, (tolerance * scale + 2 * noise) / levels
    assert own.minimum is not None and theirs.minimum is not None
    yield own.minimum, theirs.minimum, tolerance * scale + noise


def code_distances(own: EncodedSegment, codes: Tensor, norm: Tensor | None, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each number beyond the cell of its code, 0 inside, less the noise; and the noise.

    Both ``[..., B, length]``, in quantization steps (``fp8``: in spacings of e4m3 numbers at the number; gaussian: in
    units of the norm).

    Parameters
    ----------
    own : EncodedSegment
        Whose grid is that of the ranges or norms stored with ``codes``.
    """
    assert own.grid is not None
    grid = own.grid.to(torch.float64)
    if own.segment.kind == GAUSSIAN:
        assert norm is not None
        size = norm.to(torch.float64)[..., None]
        # Without a norm every code is 0, the lowest cell.
        grid = torch.where(size > 0, grid, -1e9)
        boundaries = midpoints(lloyd_max_levels(own.segment.bits))
        distance = _outside(grid, codes, torch.tensor([-math.inf, *boundaries, math.inf], dtype=torch.float64))
    else:
        assert own.scale is not None
        size = own.scale.to(torch.float64).unsqueeze(-2 if own.segment.axis == "channel" else -1)
        if own.segment.kind == FLOAT8:
            distance, spacing = _float8_distance(grid, codes)
            size = size * spacing
        else:
            distance = (grid.clamp(0, 2**own.segment.bits - 1) - codes).abs() - 0.5
    blur = torch.where(size > 0, noise[..., None] / size, 0.0).expand(distance.shape)
    return (distance - blur).clamp(min=0.0), blur


def _outside(grid: Tensor, cells: Tensor, edges: Tensor) -> Tensor:
    """How far ``grid`` lies outside cell c, between ``edges[c]`` and ``edges[c + 1]``."""
    cells = cells.long()
    return torch.maximum(edges[cells] - grid, grid - edges[cells + 1])


def _float8_distance(grid: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Distance beyond the cell of each e4m3 number in spacings at ``grid`` (infinite for NaN), and these spacings."""
    numbers = float8_numbers()
    finite = torch.unique(numbers[numbers.isfinite()])  # sorted; -0 and 0 are one
    middles = ((finite[1:] + finite[:-1]) / 2).tolist()
    chosen = numbers[codes.long()]
    cells = torch.searchsorted(finite, chosen.nan_to_num(0.0))
    size = grid.abs().clamp(2.0**-6, FLOAT8_LARGEST)
    spacing = 2.0 ** (size.log2().floor() - 3)
    distance = _outside(grid, cells, torch.tensor([-math.inf, *middles, math.inf], dtype=torch.float64)) / spacing
    return torch.where(chosen.isnan(), math.inf, distance), spacing
