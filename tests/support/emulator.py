"""What tests ask of the emulated GPU in ``plugins/emulator``."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


class Emulator:
    """The CUDA runtime inside a library that was built with ``--emulated``."""

    def __init__(self, library: Path) -> None:
        self._functions = ctypes.CDLL(str(library))
        self._functions.emulator_allow.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._functions.emulator_statistics.restype = ctypes.c_char_p

    @contextmanager
    def only_tensors(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Kernels fault at memory that belongs to no tensor whose address was asked for meanwhile."""
        plain = Tensor.data_ptr

        def data_ptr(tensor: Tensor) -> int:
            storage = tensor.untyped_storage()
            if storage.nbytes() > 0:
                self._functions.emulator_allow(storage.data_ptr(), storage.nbytes())
            return plain(tensor)

        nothing = torch.empty(1)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "data_ptr", data_ptr)
            nothing.data_ptr()
            try:
                yield
            finally:
                self._functions.emulator_allow_all()

    @contextmanager
    def blocks_reversed(self) -> Iterator[None]:
        """Thread blocks run from the last to the first."""
        self._functions.emulator_reverse(1)
        try:
            yield
        finally:
            self._functions.emulator_reverse(0)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """What each kernel did since `reset`, by its name."""
        result: dict[str, dict[str, Any]] = json.loads(self._functions.emulator_statistics())
        return result

    def reset(self) -> None:
        self._functions.emulator_reset_statistics()
