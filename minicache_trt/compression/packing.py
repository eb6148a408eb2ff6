"""Codes as bytes: one bitstream per token, head and segment, low bits first, in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minicache_trt.contract import BYTE_OFFSET


def _group(bits: int) -> tuple[int, int]:
    """Fewest codes that fill whole bytes, and how many bytes: (8, 3) for 3 bits, (8 / bits, 1) otherwise."""
    return 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., length]`` into int8 ``[..., length * bits / 8]``: low bits first, byte minus `BYTE_OFFSET`."""
    count, size = _group(bits)
    grouped = codes.reshape(*codes.shape[:-1], -1, count)
    weights = torch.tensor([1 << (bits * i) for i in range(count)], dtype=torch.int32, device=codes.device)
    word = (grouped * weights).sum(-1)
    if size > 1:
        shifts = torch.arange(0, 8 * size, 8, device=codes.device)
        word = ((word.unsqueeze(-1) >> shifts) & 255).flatten(-2)
    return (word - BYTE_OFFSET).to(torch.int8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: int8 ``[..., bytes]`` to int32 codes ``[..., bytes * 8 / bits]``."""
    count, size = _group(bits)
    word = packed.to(torch.int32) + BYTE_OFFSET
    if size > 1:
        shifts = torch.arange(0, 8 * size, 8, dtype=torch.int32, device=packed.device)
        word = (word.reshape(*word.shape[:-1], -1, size) << shifts).sum(-1, dtype=torch.int32)
    shifts = torch.arange(0, bits * count, bits, dtype=torch.int32, device=packed.device)
    return ((word.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)
