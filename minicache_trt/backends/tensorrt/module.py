"""The Python modules of TensorRT and TensorRT-RTX, and their loggers."""

from __future__ import annotations

import importlib
import importlib.util
from collections import deque
from dataclasses import dataclass
from typing import Any

from minicache_trt.errors import UserError


@dataclass(frozen=True)
class Product:
    """One of NVIDIA's products: name, Python module, package on PyPI, and the versions this code is written for."""

    name: str
    module: str
    package: str
    versions: str


PRODUCTS = {
    "tensorrt": Product("TensorRT", "tensorrt", "tensorrt", "10.16 and 11"),
    "tensorrt-rtx": Product("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", "1.7"),
}
"""By backend name."""


def load_module(backend: str) -> Any:
    """The backend's Python module.

    Raises
    ------
    UserError
        It is not installed, or cannot be loaded.
    """
    product = PRODUCTS[backend]
    install = f"pip install {product.package}"
    if importlib.util.find_spec(product.module) is None:
        raise UserError(f"backend {backend} needs the Python module {product.module}, which is not installed", install)
    try:
        return importlib.import_module(product.module)
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the Python module {product.module} cannot be loaded: {reason}", install) from error


class Messages:
    """What a module's logger said: the errors, the latest last."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=8)

    def first(self, otherwise: str) -> str:
        """The first error that is kept, on one line: later ones tend to be its consequences."""
        text = self.errors[0] if self.errors else otherwise
        return " ".join(text.split())[:300]


def make_logger(trt: Any, messages: Messages) -> Any:
    """A logger of the module that keeps errors and prints nothing."""
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, text: str) -> None:
            if level <= severity.ERROR:
                messages.errors.append(text)

    return Logger()


def start(trt: Any, kind: str, messages: Messages) -> Any:
    """The module's ``Builder`` or ``Runtime``, which logs to ``messages``.

    Raises
    ------
    UserError
        The library refuses: there is no GPU it supports, usually.
    """
    try:
        return getattr(trt, kind)(make_logger(trt, messages))
    except TypeError as error:  # what pybind11 makes of a null pointer
        reason = messages.first("it found no NVIDIA GPU that it supports")
        raise UserError(
            f"TensorRT cannot start here: {reason}", "check the GPU and its driver with nvidia-smi"
        ) from error
