"""A stream's calibrated constants as tensors, ready for the PyTorch twin."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from minicache_trt.compression.matrices import Matrices, stream_matrices
from minicache_trt.compression.plan import CompressionPlan


@dataclass(frozen=True)
class StreamConstants:
    """Constants of one stream, None where it has none; shapes as in `minicache_trt.compression.matrices.required`.

    ``head_map`` is int64, everything else float32.
    """

    head_map: Tensor | None = None
    align: Tensor | None = None
    encode: Tensor | None = None
    decode: Tensor | None = None
    mean: Tensor | None = None
    sigma: Tensor | None = None

    @classmethod
    def of(cls, source: CompressionPlan | Matrices, index: int, device: torch.device | str = "cpu") -> StreamConstants:
        """Constants of stream ``index`` of a plan, or of its matrices."""
        own = stream_matrices(source.matrices if isinstance(source, CompressionPlan) else source, index)
        tensors = {
            field.name: torch.from_numpy(np.array(own[field.name])) for field in fields(cls) if field.name in own
        }
        return cls(**{name: (x.long() if name == "head_map" else x.float()).to(device) for name, x in tensors.items()})


NO_CONSTANTS = StreamConstants()
"""Of streams that take none."""
