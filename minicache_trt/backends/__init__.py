"""Backends by name. A backend is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path

from minicache_trt.backends.base import Engine
from minicache_trt.engine_directory import EngineInfo
from minicache_trt.errors import UserError

BACKENDS = {
    "onnxruntime": "minicache_trt.backends.onnxruntime:OnnxRuntimeEngine",
    "torch": "minicache_trt.backends.torch_reference:TorchEngine",
    "cuda": "minicache_trt.backends.torch_kernels:CudaEngine",
    "host-kernels": "minicache_trt.backends.torch_kernels:HostKernelEngine",
    "tensorrt": "minicache_trt.backends.tensorrt.engine:TensorRtEngine",
    "tensorrt-rtx": "minicache_trt.backends.tensorrt.engine:TensorRtRtxEngine",
}
"""Backend name to the class that runs an engine directory.

``torch``, ``cuda`` and ``host-kernels`` read its checkpoint, not its graphs; ``host-kernels`` is ``cuda`` on the CPU,
kernels included, to test it where there is no GPU."""

Opener = Callable[[Path, EngineInfo, int | None], Engine]
"""From an engine directory, its contents and a number of threads to a running engine."""


def open_backend(name: str) -> Opener:
    """The class of a backend.

    Raises
    ------
    UserError
        Unknown name.
    """
    if name not in BACKENDS:
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        raise UserError(
            f"unknown backend {name!r}" + (f", did you mean {close[0]!r}?" if close else ""),
            f"backends: {', '.join(BACKENDS)}",
        )
    module, _, attribute = BACKENDS[name].partition(":")
    opener: Opener = getattr(importlib.import_module(module), attribute)
    return opener
