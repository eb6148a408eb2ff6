"""Where the kernel libraries are."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from minicache_trt.errors import UserError
from minicache_trt.kernels.library import KernelLibrary

LIBRARY_VARIABLE = "MINICACHE_LIBRARY"
"""Environment variable: a library, or a folder of libraries, to use in place of all others."""

LIBRARIES = {"cuda": "libminicache_cuda.so", "host": "libminicache_host.so"}
"""Kinds of library by the word their version names."""

_PACKAGE = Path(__file__).resolve().parent
_BUILD = _PACKAGE.parents[1] / "build" / "plugins"
_COMMANDS = {
    "cuda": "build_scripts/build_plugins.sh --cuda --arch native",
    "host": "build_scripts/build_plugins.sh --host",
}


def find_library(kind: str) -> Path | None:
    """The file of ``$MINICACHE_LIBRARY`` if it is of this kind, else that in ``build/plugins`` or in the package.

    Raises
    ------
    UserError
        The variable names nothing that can be used.
    """
    candidates = [*_named(kind), _BUILD / LIBRARIES[kind], _PACKAGE / LIBRARIES[kind]]
    return next((path for path in candidates if path.is_file()), None)


def _named(kind: str) -> list[Path]:
    """What the variable says of a kind."""
    value = os.environ.get(LIBRARY_VARIABLE)
    if not value:
        return []
    path = Path(value)
    if path.is_dir():
        return [path / LIBRARIES[kind]]
    if not path.is_file() or path.name not in LIBRARIES.values():
        raise UserError(
            f"{LIBRARY_VARIABLE}: expected a folder, or a file {' or '.join(LIBRARIES.values())}, got {value}",
            "correct the variable, or unset it",
        )
    return [path] if path.name == LIBRARIES[kind] else []


def open_library(kind: str) -> KernelLibrary:
    """Load the ``cuda`` or the ``host`` library.

    Raises
    ------
    UserError
        There is none, it cannot be loaded, or it is of another kind or version.
    """
    path = find_library(kind)
    build = f"build it: {_COMMANDS[kind]}"
    if path is None:
        raise UserError(f"the {kind} kernels are not built: no {LIBRARIES[kind]} in {_BUILD}", build)
    try:
        library = KernelLibrary(path)
        version, found, *_ = library.version.split()
    except (OSError, AttributeError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded: {error}", build) from error
    if found != kind:
        raise UserError(f"{path} holds the {found} kernels, expected the {kind} kernels", build)
    expected = importlib.metadata.version("minicache-trt")
    if version != expected:
        raise UserError(f"{path} is of version {version}, this package of {expected}", build)
    return library


def runs_on(version: str, capability: tuple[int, int]) -> bool:
    """Whether a library whose version names its targets (``... sm_80 sm_90a``) has code for a GPU.

    Binaries run on later minor revisions of their architecture, except ``a`` targets, which run on exactly theirs; the
    last target's PTX is compiled for anything newer.
    """
    targets = [word.removeprefix("sm_") for word in version.split() if word.startswith("sm_")]
    numbers = [divmod(int(target.rstrip("af")), 10) for target in targets]
    for target, number in zip(targets, numbers, strict=True):
        if number == capability or (target.isdigit() and number[0] == capability[0] and number <= capability):
            return True
    return bool(targets) and targets[-1].isdigit() and numbers[-1] <= capability
