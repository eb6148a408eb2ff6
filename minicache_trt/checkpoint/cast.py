"""Weights in another type than the checkpoint's, streamed to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.streaming import Progress, encode_header
from minicache_trt.checkpoint.weights import SAFETENSORS_DTYPES, WeightView, numpy_dtype, read_safetensors_file

CHUNK = 1 << 18
"""Numbers cast at a time: they stay in a core's cache."""


def cast_weights(path: Path, views: Mapping[str, WeightView], dtype: str, progress: Progress) -> dict[str, WeightView]:
    """Views of every weight in ``dtype``: into the checkpoint where it is of that type, else into the file ``path``.

    Numbers beyond the type's range become its largest (float16), so that no weight is infinite.

    Parameters
    ----------
    path : Path
        Written only if a weight has to be cast; memory in use is little.
    views : mapping
        By canonical name.
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``.
    progress : callable
        Called with weights done and weights in all.
    """
    others = {name: view for name, view in views.items() if view.dtype != dtype}
    if not others:
        return dict(views)
    stored = next(key for key, value in SAFETENSORS_DTYPES.items() if value == dtype)
    target = numpy_dtype(dtype)
    with path.open("wb") as file:
        file.write(encode_header({name: (stored, view.shape) for name, view in others.items()}))
        for done, view in enumerate(others.values()):
            progress(done, len(others))
            weight = view.numpy().reshape(-1)
            for start in range(0, len(weight), CHUNK):
                file.write(_cast(weight[start : start + CHUNK], target).view(np.uint8).data)
        progress(len(others), len(others))
    return {**views, **read_safetensors_file(path)}


def _cast(numbers: NDArray[np.generic], target: np.dtype) -> NDArray[np.generic]:
    with np.errstate(over="ignore"):
        result = numbers.astype(target)
    if target == np.float16:
        infinite = result.view(np.uint16) & 0x7FFF == 0x7C00
        if infinite.any():
            result[infinite] = np.copysign(np.float16(65504.0), result[infinite])
    return result
