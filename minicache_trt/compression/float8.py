"""e4m3 codes with one scale per range, in PyTorch.

The scale is ``max|y| / 448``, rounded to float16 first (saturating); a code is the e4m3 byte of ``y / scale``, rounded
half to even and saturated at 448. Scale 0 gives code 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.constants import FLOAT8_MAX
from minicache_trt.compression.float16 import saturate_float16


def to_bytes(x: Tensor) -> Tensor:
    """Bytes (int32, 0 to 255) of the e4m3 numbers nearest to ``x``."""
    rounded = x.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    return rounded.view(torch.uint8).to(torch.int32)


def from_bytes(codes: Tensor) -> Tensor:
    """Numbers (float32) of e4m3 bytes."""
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def quantize(y: Tensor, largest: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Codes (int32) like ``y`` and scales (float16) like ``largest``, the largest magnitude of each range along
    ``axis``."""
    scale = saturate_float16(largest / FLOAT8_MAX)
    step = scale.float().unsqueeze(axis)
    codes = to_bytes(y / torch.where(step > 0, step, torch.ones_like(step)))
    return torch.where(step > 0, codes, torch.zeros_like(codes)), scale


def dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Inverse of `quantize`, float32."""
    return from_bytes(codes) * scale.float().unsqueeze(axis)
