"""Kernels TensorRT-RTX has compiled for this GPU, kept between runs beside the engine."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def cache_path(engine: Path, device: torch.device) -> Path:
    """File of an engine's kernels for one kind of GPU, as ``decoder.sm_89.kernels``."""
    if device.type != "cuda":
        return engine.with_suffix(f".{device.type}.kernels")
    major, minor = torch.cuda.get_device_capability(device)
    return engine.with_suffix(f".sm_{major}{minor}.kernels")


class RuntimeCache:
    """Where the module has a runtime cache, what the contexts of an engine share; else nothing.

    TensorRT-RTX compiles an engine's kernels when they are first needed, for the GPU and the shapes at hand. The file
    is read if it is there and fits, and written when the engine is closed or the process ends, if there is more in it.

    Parameters
    ----------
    engine : ICudaEngine
    path : Path
        One the engine's directory need not list: it may appear, and be removed, at any time.
    """

    def __init__(self, engine: Any, path: Path) -> None:
        self.config: Any = None
        """Runtime configuration for contexts of the engine; None where the module has no cache."""
        if not hasattr(engine, "create_runtime_config"):
            return
        config = engine.create_runtime_config()
        if not hasattr(config, "create_runtime_cache"):  # TensorRT, whose kernels are in the engine
            return
        cache = config.create_runtime_cache()
        known = _read(path)
        if known and not cache.deserialize(known):  # of another version or GPU, or damaged: it is replaced
            known = b""
        config.set_runtime_cache(cache)
        self.config = config
        self._close = weakref.finalize(self, _write, cache, path, known)

    def close(self) -> None:
        """Write the file now."""
        if self.config is not None:
            self._close()


def _read(path: Path) -> bytes:
    """Empty where there is none, or none that can be read: it is only to save time."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _write(cache: Any, path: Path, known: bytes) -> None:
    """Replace the file, whole, by what the cache holds; a directory that cannot be written to has none."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        data = bytes(cache.serialize())
        if data and data != known:
            temporary.write_bytes(data)
            temporary.replace(path)
    except (OSError, RuntimeError):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
