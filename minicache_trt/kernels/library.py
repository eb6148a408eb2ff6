"""Kernels on PyTorch tensors: the CUDA library on a GPU, the host build on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.contract import StreamLayout
from minicache_trt.descriptor import stream_descriptor, stream_numbers
from minicache_trt.kernels.structs import SIGNATURES, ReadMaps, StreamPools, StreamView, WriteMaps

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Compute types by their number in the C ABI."""


class KernelError(RuntimeError):
    """A kernel refused its arguments or could not be launched; the message names the argument."""


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def stream_of(tensor: Tensor) -> int:
    """PyTorch's current CUDA stream for a tensor's device; 0 on the CPU."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream) if tensor.is_cuda else 0


class KernelLibrary:
    """Functions of one built library.

    Parameters
    ----------
    path : Path
        ``libminicache_cuda.so`` or ``libminicache_host.so``.

    Raises
    ------
    OSError
        It cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self._library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, arguments

    @property
    def version(self) -> str:
        return str(self._library.minicache_version().decode())

    def call(self, name: str, *arguments: object) -> None:
        """Call ``minicache_<name>``.

        Raises
        ------
        KernelError
            It returned an error.
        """
        if getattr(self._library, f"minicache_{name}")(*arguments):
            raise KernelError(self.last_error())

    def size(self, name: str, *arguments: object) -> int:
        """Bytes ``minicache_<name>`` answers with."""
        return int(getattr(self._library, f"minicache_{name}")(*arguments))

    def last_error(self) -> str:
        return str(self._library.minicache_last_error().decode())

    def create_shape(self, integers: Sequence[int], numbers: Sequence[float], heads: int, dim: int) -> int:
        """Address of a parsed stream description.

        Raises
        ------
        KernelError
            It describes no stream.
        """
        described = (ctypes.c_int32 * len(integers))(*integers)
        floats = (ctypes.c_float * len(numbers))(*numbers)
        result = self._library.minicache_stream_create(described, len(integers), floats, len(numbers), heads, dim)
        if not result:
            raise KernelError(self.last_error())
        return int(result)

    def destroy_shape(self, shape: int) -> None:
        self._library.minicache_stream_destroy(shape)


class StreamShape:
    """A stream's parsed description; lives in the library until this object is collected."""

    def __init__(self, library: KernelLibrary, layout: StreamLayout, member: int = 0) -> None:
        config = layout.config
        self._library = library
        self.address = library.create_shape(
            stream_descriptor(layout, member), stream_numbers(layout), config.num_kv_heads, config.head_dim
        )

    def __del__(self) -> None:
        if hasattr(self, "address"):
            self._library.destroy_shape(self.address)


def stream_pools(layout: StreamLayout, tensors: Mapping[str, Tensor]) -> StreamPools:
    """Pointers to a stream's pools among ``tensors`` (by contract name)."""
    return StreamPools(**{kind: address(tensors[pool.name]) for kind, pool in layout.pools.items()})


def device_maps(arrays: Mapping[str, NDArray[np.generic]], device: torch.device | str) -> dict[str, Tensor]:
    """`minicache_trt.functions.stream_maps` arrays as tensors."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}


def read_maps_of(maps: Mapping[str, Tensor]) -> ReadMaps:
    """Pointers to a layer's reading maps; the tensors must outlive their use."""
    pointers = {name: address(maps.get(name)) for name in ("map", "residual_map", "offset", "heads", "slots")}
    return ReadMaps(**pointers, map_heads=len(maps["map"]) if "map" in maps else 0)


def write_maps_of(maps: Mapping[str, Tensor], readers: Sequence[Mapping[str, Tensor]] = ()) -> WriteMaps:
    """Pointers to a stream's writing maps; ``readers``: reading maps of its layers, where retention needs them."""
    result = WriteMaps(**{name: address(maps.get(name)) for name in ("transform", "align", "encode", "bias", "heads")})
    for member, reader in enumerate(readers):
        result.map[member], result.offset[member] = address(reader.get("map")), address(reader.get("offset"))
    return result


def stream_view(
    shape: StreamShape, layout: StreamLayout, tensors: Mapping[str, Tensor], maps: Mapping[str, Tensor]
) -> StreamView:
    """One stream as a layer reads it."""
    return StreamView(shape.address, stream_pools(layout, tensors), read_maps_of(maps))
