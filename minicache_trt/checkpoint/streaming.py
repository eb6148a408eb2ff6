"""Safetensors files written tensor by tensor: the header first, so that one tensor at a time is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

Progress = Callable[[int, int], None]
"""Called with what is done and how much there is in all."""

_ITEM_SIZES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}


def encode_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What such a file begins with, for tensors (name to safetensors dtype and shape) that follow in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * _ITEM_SIZES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)  # tensors begin at an aligned offset
    return len(encoded).to_bytes(8, "little") + encoded
