"""Kernels on the emulated GPU that may use the memory of tensors, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from minicache_trt.kernels.emulated import EmulatedRuntime


@contextmanager
def only_tensors(runtime: EmulatedRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels fault at memory that belongs to no tensor whose address was asked for meanwhile."""
    plain = Tensor.data_ptr

    def data_ptr(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0:
            runtime.allow(storage.data_ptr(), storage.nbytes())
        return plain(tensor)

    nothing = torch.empty(1)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "data_ptr", data_ptr)
        nothing.data_ptr()
        try:
            yield
        finally:
            runtime.allow_all()
