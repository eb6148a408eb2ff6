"""Safetensors files written tensor by tensor, from numbers that are computed or fetched only when their turn comes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.weights import ITEM_SIZES, SAFETENSORS_DTYPES, WeightView, numpy_dtype

Progress = Callable[[int, int], None]
"""Called with tensors done and tensors in all."""

_CODES = {name: code for code, name in SAFETENSORS_DTYPES.items()} | {"uint8": "U8"}
_SIZES = {**ITEM_SIZES, "uint8": 1}
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file to be written.

    Parameters
    ----------
    name : str
    dtype : str
        One of ``ITEM_SIZES``, or ``uint8``.
    shape : tuple of int
    read : callable
        Its numbers in order, in as many arrays as it likes, of ``dtype``. It is called when the tensor is written, and
        memory holds one array at a time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]

    def renamed(self, name: str) -> StoredTensor:
        return replace(self, name=name)

    def array(self) -> NDArray[Any]:
        """All of it in memory, ``shape``."""
        parts = [np.asarray(part).reshape(-1) for part in self.read()]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(self.shape)


def from_view(view: WeightView, name: str | None = None) -> StoredTensor:
    """A tensor that lies in another file as it is."""
    return StoredTensor(name or view.name, view.dtype, view.shape, lambda: iter([view.numpy()]))


def stacked(name: str, views: Sequence[WeightView]) -> StoredTensor:
    """Tensors of one type under one another, joined along their first axis; nothing is copied before it is written."""
    first = views[0]
    shape = (sum(view.shape[0] for view in views), *first.shape[1:])
    return StoredTensor(name, first.dtype, shape, lambda: (view.numpy() for view in views))


def beside(name: str, views: Sequence[WeightView]) -> StoredTensor:
    """Matrices of one type beside one another, joined along their second axis; at most 16 MiB of rows at a time."""
    first = views[0]
    rows, columns = first.shape[0], sum(view.shape[1] for view in views)
    step = max(1, (16 << 20) // (columns * _SIZES[first.dtype]))

    def read() -> Iterable[NDArray[Any]]:
        arrays = [view.numpy() for view in views]
        for begin in range(0, rows, step):
            yield np.concatenate([array[begin : begin + step] for array in arrays], 1)

    return StoredTensor(name, first.dtype, (rows, columns), read)


def write_tensors(
    path: Path,
    tensors: Sequence[StoredTensor],
    progress: Progress | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file. Memory in use is that of the largest array a tensor hands out.

    Raises
    ------
    ValueError
        A tensor hands out another number of bytes than its shape says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, tensor in enumerate(tensors):
            if progress is not None:
                progress(done, len(tensors))
            written = 0
            for part in tensor.read():
                array = np.ascontiguousarray(part, _numpy_type(tensor.dtype))
                file.write(array.reshape(-1).view(np.uint8).data)
                written += array.nbytes
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: expected {tensor.nbytes} bytes, got {written}")
    if progress is not None:
        progress(len(tensors), len(tensors))


def _numpy_type(dtype: str) -> np.dtype:
    return np.dtype(np.uint8) if dtype == "uint8" else numpy_dtype(dtype)
