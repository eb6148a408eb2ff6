"""Our TensorRT plugins: where their library is, and loading it into a module's registry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from minicache_trt.errors import UserError

PLUGIN_LIBRARY = "libminicache_trt_plugins.so"
PLUGINS_VARIABLE = "MINICACHE_TRT_PLUGINS"
"""Environment variable: the library to use, or ``0`` for none."""

_PACKAGE = Path(__file__).resolve().parents[2]


def find_plugins() -> Path | None:
    """The library the variable names, else the one in ``build/plugins`` or in the package.

    Raises
    ------
    UserError
        The variable names no file.
    """
    value = os.environ.get(PLUGINS_VARIABLE)
    if value == "0":
        return None
    if value:
        if not Path(value).is_file():
            raise UserError(
                f"{PLUGINS_VARIABLE}: expected a file or 0, got {value}", "correct the variable or unset it"
            )
        return Path(value)
    candidates = (_PACKAGE.parent / "build" / "plugins" / PLUGIN_LIBRARY, _PACKAGE / PLUGIN_LIBRARY)
    return next((path for path in candidates if path.is_file()), None)


def supports_plugins(trt: Any) -> bool:
    """Whether networks of this module can hold plugins; those of TensorRT-RTX cannot."""
    return hasattr(trt.INetworkDefinition, "add_plugin_v3")


def load_plugins(trt: Any, path: Path) -> None:
    """Register the library's creators with the module.

    Raises
    ------
    UserError
        It cannot be loaded.
    """
    try:
        handle = trt.get_plugin_registry().load_library(str(path))
    except (RuntimeError, OSError) as error:
        raise _unusable(path, str(error)) from error
    if handle is None:
        raise _unusable(path, "TensorRT refuses it")


def _unusable(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} cannot be loaded as a plugin library: {why}",
        f"build it for this TensorRT, or set {PLUGINS_VARIABLE}=0 to build without plugins",
    )
