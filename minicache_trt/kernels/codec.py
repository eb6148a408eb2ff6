"""Appending to the full tier, compressing its blocks and restoring them, on tensors.

Tensors lie on the library's device: a GPU for the CUDA library, the CPU for the host build. Kernels run on PyTorch's
current stream.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout
from minicache_trt.kernels.library import (
    TYPES,
    KernelLibrary,
    StreamShape,
    address,
    device_maps,
    stream_of,
    stream_pools,
    stream_view,
    write_maps_of,
)
from minicache_trt.model.rope import inverse_frequencies

Arrays = Mapping[str, NDArray[np.generic]]


def append_kv(library: KernelLibrary, kv: Tensor, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Write new keys and values into their slots of one layer's full tier; numbers that are not finite become zero.

    Parameters
    ----------
    library : KernelLibrary
    kv : Tensor
        ``[Nf, 2, H, B, D]``, contiguous; changed in place.
    k, v : Tensor
        ``[T, H * D]`` in kv's type; rows contiguous, any stride between tokens that keeps them on 16 bytes.
    slot_mapping : Tensor
        int32 ``[T]``: block * B + offset.

    Raises
    ------
    KernelError
        The kernel refused its arguments.
    """
    blocks, _, heads, _, dim = kv.shape
    library.call(
        "append_kv",
        TYPES[kv.dtype],
        address(kv),
        blocks,
        heads,
        dim,
        address(k),
        address(v),
        k.stride(0),
        v.stride(0),
        address(slot_mapping),
        len(slot_mapping),
        stream_of(kv),
    )


class CompressStream:
    """Compression of full blocks into the pools of one stream, with its maps on the device.

    Parameters
    ----------
    library : KernelLibrary
    layout : StreamLayout
    write_maps : mapping
        As `minicache_trt.functions.stream_maps.write_maps` returns them.
    reader_maps : sequence of mapping
        Reading maps of the stream's layers, in order; linear streams that retain tokens measure losses with them.
    config : ModelConfig
    device : torch.device or str
    """

    def __init__(
        self,
        library: KernelLibrary,
        layout: StreamLayout,
        write_maps: Arrays,
        reader_maps: Sequence[Arrays],
        config: ModelConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout
        self._library = library
        self._shape = StreamShape(library, layout)
        # Transforms are butterflies here; their matrix stays behind.
        self._maps = device_maps({name: x for name, x in write_maps.items() if name != "transform"}, device)
        measured = layout.stream.merge == "linear" and layout.stream.retained
        needed = [{name: maps[name] for name in ("map", "offset")} for maps in reader_maps] if measured else []
        self._readers = [device_maps(maps, device) for maps in needed]
        self._write_maps = write_maps_of(self._maps, self._readers)
        self._frequencies = inverse_frequencies(layout.config.rope, config.head_dim).to(device)

    def __call__(
        self,
        full_pools: Sequence[Tensor],
        pools: Mapping[str, Tensor],
        source: Tensor,
        target: Tensor,
        block_index: Tensor,
    ) -> None:
        """Compress blocks ``source`` of the group's layers into blocks ``target``, changed in place.

        Parameters
        ----------
        full_pools : sequence of Tensor
            ``[Nf, 2, H, B, D]`` of each of the stream's layers.
        pools : mapping
            The stream's pools by the contract's names.
        source, target, block_index : Tensor
            int32 ``[N]``: full-tier block, compressed-tier block, number of the block within its sequence.

        Raises
        ------
        KernelError
            The kernel refused its arguments.
        """
        kv, count = full_pools[0], len(source)
        layers = (ctypes.c_void_p * len(full_pools))(*(address(pool) for pool in full_pools))
        size = self._library.size("compress_workspace", TYPES[kv.dtype], self._shape.address, count)
        workspace = torch.empty(size, dtype=torch.uint8, device=kv.device)
        self._library.call(
            "compress_blocks",
            TYPES[kv.dtype],
            self._shape.address,
            layers,
            address(source),
            address(target),
            address(block_index),
            count,
            ctypes.byref(stream_pools(self.layout, pools)),
            ctypes.byref(self._write_maps),
            address(self._frequencies),
            address(workspace),
            size,
            stream_of(kv),
        )


def restore_blocks(
    library: KernelLibrary,
    shape: StreamShape,
    layout: StreamLayout,
    tensors: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
    blocks: Tensor,
    block_index: Tensor,
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    frequencies: Tensor | None = None,
) -> Tensor:
    """Keys (after RoPE) or values of one layer.

    Parameters
    ----------
    library : KernelLibrary
    shape : StreamShape
        The stream's, made for the layer.
    layout : StreamLayout
    tensors : mapping
        The stream's pools by the contract's names.
    maps : mapping
        The layer's reading maps, from `device_maps`.
    blocks, block_index : Tensor
        int32 ``[N]``: compressed-tier block, its number within its sequence.
    config : ModelConfig
    dtype : torch.dtype, optional
        Compute type: that of pools in it; by default that of the configuration.
    frequencies : Tensor, optional
        `inverse_frequencies` on the device; by default they are moved there, which a captured step may not do.

    Returns
    -------
    Tensor
        ``[N, H, B, D]`` by KV head.

    Raises
    ------
    KernelError
        The kernel refused its arguments.
    """
    dtype = dtype or getattr(torch, config.dtype)
    out = blocks.new_empty((len(blocks), config.num_kv_heads, BLOCK_SIZE, config.head_dim), dtype=dtype)
    if frequencies is None:
        frequencies = inverse_frequencies(layout.config.rope, config.head_dim).to(blocks.device)
    size = library.size("restore_workspace", TYPES[dtype], shape.address, len(blocks))
    workspace = torch.empty(size, dtype=torch.uint8, device=blocks.device)
    library.call(
        "restore_blocks",
        TYPES[dtype],
        ctypes.byref(stream_view(shape, layout, tensors, maps)),
        address(blocks),
        address(block_index),
        len(blocks),
        address(frequencies),
        address(out),
        address(workspace),
        size,
        stream_of(blocks),
    )
    return out
