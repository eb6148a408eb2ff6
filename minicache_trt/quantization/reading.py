"""Weights read, not mapped: the pages of a mapped file would count as this process's memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.errors import UserError
from minicache_trt.quantization.rounding import row_chunks


def read_rows(view: WeightView) -> Iterator[tuple[slice, Tensor]]:
    """A weight's rows, as many at a time as `row_chunks` says, in the file's type.

    Raises
    ------
    UserError
        The file cannot be read.
    """
    rows, row_bytes, dtype = view.shape[0], view.nbytes // view.shape[0], getattr(torch, view.dtype)
    try:
        file = os.open(view.file, os.O_RDONLY)
    except OSError as error:
        raise _unreadable(view, error) from error
    try:
        for chunk in row_chunks(rows, row_bytes // dtype.itemsize):
            data = bytearray((chunk.stop - chunk.start) * row_bytes)
            _read(file, view, memoryview(data), view.offset + chunk.start * row_bytes)
            yield chunk, torch.frombuffer(data, dtype=dtype).view(-1, *view.shape[1:])
    finally:
        os.close(file)


def read_weight(view: WeightView) -> Tensor:
    """All of a weight, float32."""
    result = torch.empty(view.shape)
    for rows, part in read_rows(view):
        result[rows] = part
    return result


def _read(file: int, view: WeightView, data: memoryview, offset: int) -> None:
    try:
        while data:
            count = os.preadv(file, [data], offset)
            if not count:
                raise UserError(f"{view.file}: ends within {view.name}", "download or copy the file again")
            data, offset = data[count:], offset + count
    except OSError as error:
        raise _unreadable(view, error) from error


def _unreadable(view: WeightView, error: OSError) -> UserError:
    return UserError(f"{view.file}: cannot be read ({error.strerror})", "check the path and its permissions")
