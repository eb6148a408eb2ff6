"""A checkpoint with floats of another type, written once; the engine needs the original no more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from minicache_trt.checkpoint.binding import stored_shape, stored_tensors, weight_shapes
from minicache_trt.checkpoint.weights import SAFETENSORS_DTYPES, WeightView
from minicache_trt.compression.constants import FLOAT16_MAX
from minicache_trt.config import ModelConfig
from minicache_trt.quantization.groups import Group, NotFinite
from minicache_trt.quantization.partial_file import Shapes
from minicache_trt.quantization.reading import read_rows


def cast_shapes(config: ModelConfig, dtype: str) -> Shapes:
    """Tensors of the file, by their Hugging Face names."""
    stored = next(code for code, name in SAFETENSORS_DTYPES.items() if name == dtype)
    shapes = weight_shapes(config)
    return {name: (stored, stored_shape(shapes, parts)) for name, parts in stored_tensors(config).items()}


def cast_groups(views: Mapping[str, WeightView], names: Shapes, dtype: str, clipped: list[str]) -> list[Group]:
    """The tensors of `cast_shapes`; computing one takes a few megabytes.

    Numbers beyond float16's range become its largest, so that no weight is infinite.

    Parameters
    ----------
    views : mapping
        By Hugging Face name.
    names : mapping
        Of `cast_shapes`.
    dtype : str
        ``float16``, ``bfloat16`` or ``float32``.
    clipped : list of str
        Takes the names of weights with numbers beyond the range.
    """
    target = getattr(torch, dtype)
    return [Group((name,), views[name], partial(_cast, name, views[name], target, clipped)) for name in names]


def _cast(name: str, view: WeightView, dtype: torch.dtype, clipped: list[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    for _, rows in read_rows(view):
        if not rows.isfinite().all():
            raise NotFinite(name)
        if dtype == torch.float16 and bool((rows.abs() > FLOAT16_MAX).any()):
            clipped.append(name)
            rows = rows.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        yield name, rows.to(dtype).view(torch.uint8).numpy()


def write_config(raw: Mapping[str, Any], directory: Path, dtype: str) -> None:
    """config.json of the cast checkpoint."""
    config = {key: value for key, value in raw.items() if key != "torch_dtype"} | {"dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
