"""Kernels for ONNX Runtime on the CPU: where they are, and graphs that use them.

A node of the `minicache` domain has a model-local function in standard operators, so every engine runs anywhere. Where
the compiled library is at hand, the function is taken out of the graph and the library's custom operator does the
node's work: it attends to keys and values where they lie, which standard operators have to gather first.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

import onnx

from minicache_trt.contract import DOMAIN

SWITCH = "MINICACHE_CPU_KERNELS"
"""Environment variable: ``0`` keeps the functions, a path names another library."""

_OPERATOR = "PagedAttention"
_STEM = "_cpu_kernels"
_PACKAGE = Path(__file__).parents[1]


@functools.cache
def _find(switch: str) -> tuple[Path, str] | None:
    if switch == "0":
        return None
    built = [_PACKAGE / f"{_STEM}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    for path in [Path(switch)] if switch else built:
        try:
            library = ctypes.CDLL(str(path))
            library.minicache_cpu_isa.restype = ctypes.c_char_p
            return path, library.minicache_cpu_isa().decode()
        except (OSError, AttributeError):
            continue
    return None


def cpu_kernels() -> Path | None:
    """The library to register with a session, or None: not built for this machine, or switched off."""
    found = _find(os.environ.get(SWITCH, ""))
    return None if found is None else found[0]


def instruction_set() -> str | None:
    """What the kernels use of this processor: ``avx512``, ``avx2`` or ``generic``; None without them."""
    found = _find(os.environ.get(SWITCH, ""))
    return None if found is None else found[1]


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
