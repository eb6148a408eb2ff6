"""float16 numbers that are stored beside codes."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.constants import FLOAT16_MAX


def saturate_float16(x: Tensor) -> Tensor:
    """Round to float16; magnitudes above its range become its largest number."""
    return x.clamp(-FLOAT16_MAX, FLOAT16_MAX).to(torch.float16)
