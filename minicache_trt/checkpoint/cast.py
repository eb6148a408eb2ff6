"""Weights in another type than the checkpoint's, streamed to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from minicache_trt.checkpoint.streaming import encode_header
from minicache_trt.checkpoint.weights import SAFETENSORS_DTYPES, WeightView, numpy_dtype, read_safetensors_file

Progress = Callable[[int, int], None]


def cast_weights(path: Path, views: Mapping[str, WeightView], dtype: str, progress: Progress) -> dict[str, WeightView]:
    """Views of every weight in ``dtype``: into the checkpoint where it is of that type, else into the file ``path``.

    Numbers beyond the type's range become its largest (float16), so that no weight is infinite.

    Parameters
    ----------
    path : Path
        Written only if a weight has to be cast; memory in use is that of the largest.
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
            weight = view.numpy()
            if dtype == "float16":
                weight = np.clip(weight.astype(np.float32), -65504.0, 65504.0)
            file.write(np.ascontiguousarray(weight.astype(target)).view(np.uint8).data)
        progress(len(others), len(others))
    return {**views, **read_safetensors_file(path)}
