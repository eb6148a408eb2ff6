"""Symmetric rounding of weights, a scale for every block of inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 3 << 18
"""Weights rounded at a time: temporaries of so many stay in a core's cache."""


def blocks_of(weight: Tensor, block: int) -> Tensor:
    """``[out, blocks, block]`` float32 of ``[out, in]``; the last block is padded with zeros."""
    rows, columns = weight.shape
    padding = -columns % block
    wide = weight.float()
    return (torch.nn.functional.pad(wide, (0, padding)) if padding else wide).view(rows, -1, block)


def block_scales(blocks: Tensor, bits: int) -> Tensor:
    """Scales ``[out, blocks]``.

    The entry of largest magnitude maps to -2^(bits-1), the one code without a counterpart, so the whole range is used.
    """
    smallest, largest = torch.aminmax(blocks, dim=-1)
    return torch.where(largest >= -smallest, largest, smallest) / -(1 << (bits - 1))


def round_blocks(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes 0 to 2^bits - 1, as floats in the shape of ``blocks``; 2^(bits-1) stands for zero."""
    zero = 1 << (bits - 1)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return (blocks * inverse[..., None]).round_().add_(zero).clamp_(0, 2 * zero - 1)


def rounded(blocks: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What codes and scales stand for, in the shape of ``blocks``."""
    return round_blocks(blocks, scales, bits).sub_(1 << (bits - 1)).mul_(scales[..., None])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 ``[out, blocks, block * bits / 8]``, low bits first."""
    whole = codes.to(torch.uint8)
    return whole if bits == 8 else whole[..., 0::2] | (whole[..., 1::2] << 4)


def quantize_rows(weight: Tensor, bits: int, block: int, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round rows to nearest.

    Parameters
    ----------
    weight : Tensor
        ``[out, in]``.
    bits, block : int
    clip : Tensor, optional
        Factors of the scales, ``[out, blocks]``.

    Returns
    -------
    codes : Tensor
        uint8 ``[out, blocks, block * bits / 8]``.
    scales : Tensor
        float32 ``[out, blocks]``.
    """
    blocks = blocks_of(weight, block)
    scales = block_scales(blocks, bits)
    if clip is not None:
        scales = scales * clip
    return pack_codes(round_blocks(blocks, scales, bits), bits), scales


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a weight, about `CHUNK` numbers at a time."""
    step = max(1, CHUNK // columns)
    for first in range(0, rows, step):
        yield slice(first, min(rows, first + step))
