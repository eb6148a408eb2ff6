"""Kernels for ONNX Runtime on the CPU: where they are, and graphs that use them.

A node of the `minicache` domain has a model-local function in standard operators, so every engine runs anywhere. Where
the compiled library is at hand, the function is taken out of the graph and the library's custom operator does the
node's work: it attends to keys and values where they lie, which standard operators have to gather first.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path
from typing import NamedTuple

import onnx

from minicache_trt.contract import DOMAIN
from minicache_trt.errors import UserError

SWITCH = "MINICACHE_CPU_KERNELS"
"""Environment variable: ``0`` keeps the functions, a path names another library."""

_OPERATOR = "PagedAttention"
_STEM = "_cpu_kernels"
_PACKAGE = Path(__file__).parents[1]


class _Library(NamedTuple):
    path: Path
    instruction_set: str

    @classmethod
    def open(cls, path: Path) -> _Library:
        """Raises OSError when it cannot be loaded, AttributeError when it holds something else."""
        library = ctypes.CDLL(str(path))
        library.minicache_cpu_isa.restype = ctypes.c_char_p
        return cls(path, library.minicache_cpu_isa().decode())


@functools.cache
def _find(switch: str) -> _Library | None:
    if switch == "0":
        return None
    if switch:
        return _named(Path(switch))
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        with contextlib.suppress(OSError, AttributeError):
            return _Library.open(_PACKAGE / f"{_STEM}{suffix}")
    return None


def _named(path: Path) -> _Library:
    hint = f"unset {SWITCH} for the library of the installation, or set it to 0 to do without"
    if not path.is_file():
        raise UserError(f"{SWITCH}: there is no file {path}", hint)
    try:
        return _Library.open(path.absolute())
    except OSError as error:
        raise UserError(f"{SWITCH}: {path} cannot be loaded: {error}", hint) from error
    except AttributeError as error:
        raise UserError(f"{SWITCH}: {path} does not hold minicache-trt's CPU kernels", hint) from error


def cpu_kernels() -> Path | None:
    """The library to register with a session, or None: not built for this machine, or switched off.

    Raises
    ------
    UserError
        The environment names a library that is missing or cannot be used.
    """
    found = _find(os.environ.get(SWITCH, ""))
    return None if found is None else found.path


def instruction_set() -> str | None:
    """What the kernels use of this processor: ``avx512``, ``avx2`` or ``generic``; None without them.

    Raises
    ------
    UserError
        As `cpu_kernels` does.
    """
    found = _find(os.environ.get(SWITCH, ""))
    return None if found is None else found.instruction_set


def with_kernels(model: onnx.ModelProto) -> bool:
    """Take out the functions the kernels replace; False, and nothing changed, if a node does not describe itself or
    the graph does not compute in float32."""
    pools = [value.type.tensor_type.elem_type for value in model.graph.input if value.name.startswith("kv.")]
    if any(kind != onnx.TensorProto.FLOAT for kind in pools):
        return False
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (DOMAIN, _OPERATOR)]
    if not nodes or any(all(a.name != "input_names" for a in node.attribute) for node in nodes):
        return False
    for node in nodes:
        node.overload = ""
    kept = [function for function in model.functions if (function.domain, function.name) != (DOMAIN, _OPERATOR)]
    del model.functions[:]
    model.functions.extend(kept)
    return True
