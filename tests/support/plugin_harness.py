"""Binding of ``plugins/harness``: plugins driven through TensorRT's interfaces, without TensorRT."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 2,
    torch.int32: 3,
    torch.bfloat16: 7,
    torch.int64: 8,
}
"""nvinfer1::DataType of each dtype."""
INT32, CHAR = 5, 6
"""nvinfer1::PluginFieldType of the fields our plugins have."""
BUILD, RUNTIME = 0, 1
"""nvinfer1::TensorRTPhase."""
LINEAR, CHW32 = 0, 5
"""nvinfer1::TensorFormat."""

Fields = Mapping[str, int | str]


class PluginError(RuntimeError):
    """A plugin returned an error; the message is what it logged."""


class TensorStruct(Structure):
    _fields_ = [
        ("type", c_int32),
        ("format", c_int32),
        ("rank", c_int32),
        ("extents", c_int64 * 8),
        ("data", c_void_p),
    ]


class _Field(Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("type", c_int32), ("length", c_int32)]


_TENSORS, _COUNT = POINTER(TensorStruct), c_int32
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "open": (POINTER(c_void_p), (c_char_p, POINTER(c_int32))),
    "messages": (c_char_p, ()),
    "creator_name": (c_char_p, (c_void_p,)),
    "create": (c_void_p, (c_void_p, POINTER(_Field), _COUNT, c_int32)),
    "destroy": (None, (c_void_p,)),
    "clone": (c_void_p, (c_void_p,)),
    "attach": (c_void_p, (c_void_p,)),
    "plugin_name": (c_char_p, (c_void_p,)),
    "field": (c_bool, (c_void_p, c_int32, POINTER(_Field))),
    "outputs": (c_int32, (c_void_p,)),
    "aliased_input": (c_int32, (c_void_p, c_int32)),
    "infer": (c_int32, (c_void_p, _TENSORS, _COUNT, POINTER(c_int32), POINTER(c_int32))),
    "supports": (c_bool, (c_void_p, c_int32, _TENSORS, _COUNT, _COUNT)),
    "configure": (c_int32, (c_void_p, _TENSORS, _COUNT, _TENSORS, _COUNT)),
    "workspace": (c_int64, (c_void_p, _TENSORS, _COUNT, _TENSORS, _COUNT)),
    "shape_change": (c_int32, (c_void_p, _TENSORS, _COUNT, _TENSORS, _COUNT)),
    "enqueue": (c_int32, (c_void_p, _TENSORS, _COUNT, _TENSORS, _COUNT, c_void_p, c_void_p)),
}


class Harness:
    """Plugins of one library.

    Parameters
    ----------
    harness : Path
        ``libminicache_trt_harness.so``.
    library : Path
        The plugin library.
    """

    def __init__(self, harness: Path, library: Path) -> None:
        self.library = library
        self._functions = ctypes.CDLL(str(harness))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._functions, f"harness_{name}")
            function.restype, function.argtypes = result, arguments
        count = c_int32()
        creators = self.call("open", str(library).encode(), ctypes.byref(count))
        if not creators:
            raise PluginError(self.messages())
        self.creators = {self.call("creator_name", creators[i]).decode(): int(creators[i]) for i in range(count.value)}

    def call(self, name: str, *arguments: object) -> Any:
        return getattr(self._functions, f"harness_{name}")(*arguments)

    def messages(self) -> str:
        """What was logged since the last call, a line each: severity and message."""
        return self.call("messages").decode()

    def create(self, op: str, fields: Fields, phase: int = BUILD) -> Plugin:
        """A plugin from its fields.

        Raises
        ------
        PluginError
            It was refused.
        """
        numbers = {name: c_int32(value) for name, value in fields.items() if isinstance(value, int)}
        texts = {name: value.encode() for name, value in fields.items() if isinstance(value, str)}
        array = (_Field * len(fields))()
        for place, name in enumerate(fields):
            data: Any = ctypes.addressof(numbers[name]) if name in numbers else ctypes.cast(texts[name], c_void_p).value
            kind, length = (INT32, 1) if name in numbers else (CHAR, len(texts[name]))
            array[place] = _Field(name.encode(), data, kind, length)
        address = self.call("create", self.creators[f"minicache::{op}::1"], array, len(fields), phase)
        return self._plugin(address)

    def _plugin(self, address: int | None) -> Plugin:
        if not address:
            raise PluginError(self.messages())
        return Plugin(self, address)


class Plugin:
    """One plugin object; destroyed with this one."""

    def __init__(self, harness: Harness, address: int) -> None:
        self._harness, self._address = harness, address

    def __del__(self) -> None:
        self._harness.call("destroy", self._address)

    @property
    def name(self) -> str:
        return self._harness.call("plugin_name", self._address).decode()

    def clone(self) -> Plugin:
        return self._harness._plugin(self._harness.call("clone", self._address))

    def attach(self) -> Plugin:
        """The clone an execution context works with."""
        return self._harness._plugin(self._harness.call("attach", self._address))

    def fields(self) -> dict[str, int | str]:
        """What an engine would keep."""
        result: dict[str, int | str] = {}
        field = _Field()
        while self._harness.call("field", self._address, len(result), ctypes.byref(field)):
            text = field.type == CHAR
            raw = ctypes.string_at(field.data or 0, field.length * (1 if text else 4)) if field.length else b""
            result[field.name.decode()] = raw.decode() if text else int.from_bytes(raw, "little", signed=True)
        return result

    def aliases(self) -> list[int]:
        """Input of each output, -1 where an output has memory of its own."""
        outputs = self._harness.call("outputs", self._address)
        return [self._harness.call("aliased_input", self._address, output) for output in range(outputs)]

    def infer(self, inputs: Sequence[TensorStruct]) -> tuple[list[int], list[int]]:
        """Of each output: the input whose extents it has, and its type."""
        count = self._harness.call("outputs", self._address)
        shape_of, types = (c_int32 * count)(), (c_int32 * count)()
        self._check(self._harness.call("infer", self._address, _array(inputs), len(inputs), shape_of, types))
        return list(shape_of), list(types)

    def supports(self, place: int, inputs: Sequence[TensorStruct], outputs: Sequence[TensorStruct]) -> bool:
        tensors = _array([*inputs, *outputs])
        return bool(self._harness.call("supports", self._address, place, tensors, len(inputs), len(outputs)))

    def configure(self, largest: Sequence[TensorStruct], outputs: Sequence[TensorStruct]) -> None:
        self._check(self._harness.call("configure", self._address, *_both(largest, outputs)))

    def workspace(self, largest: Sequence[TensorStruct], outputs: Sequence[TensorStruct]) -> int:
        return int(self._harness.call("workspace", self._address, *_both(largest, outputs)))

    def shape_change(self, inputs: Sequence[TensorStruct], outputs: Sequence[TensorStruct]) -> None:
        self._check(self._harness.call("shape_change", self._address, *_both(inputs, outputs)))

    def enqueue(
        self, inputs: Sequence[TensorStruct], outputs: Sequence[TensorStruct], workspace: int | None, stream: int = 0
    ) -> None:
        self._check(self._harness.call("enqueue", self._address, *_both(inputs, outputs), workspace, stream))

    def _check(self, status: int) -> None:
        if status:
            raise PluginError(self._harness.messages())


def described(tensor: Tensor, extents: Sequence[int] | None = None, form: int = LINEAR) -> TensorStruct:
    """A tensor as plugins are told of it; ``extents`` in place of its own."""
    assert tensor.is_contiguous()
    own = list(tensor.shape if extents is None else extents)
    padded = (c_int64 * 8)(*own)
    return TensorStruct(TYPES[tensor.dtype], form, len(own), padded, tensor.data_ptr())


def _array(tensors: Sequence[TensorStruct]) -> Any:
    return (TensorStruct * max(1, len(tensors)))(*tensors)


def _both(inputs: Sequence[TensorStruct], outputs: Sequence[TensorStruct]) -> tuple[Any, int, Any, int]:
    return _array(inputs), len(inputs), _array(outputs), len(outputs)
