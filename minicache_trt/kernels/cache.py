"""The two-tier cache on a device: pools, every stream's shape and maps, and the two custom ops on them."""

from __future__ import annotations

import math
from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import PARTS
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, compressed_pools, full_pools, plan_layout
from minicache_trt.functions.stream_maps import read_maps, write_maps
from minicache_trt.kernels import structs
from minicache_trt.kernels.codec import CompressStream, append_kv
from minicache_trt.kernels.library import (
    TYPES,
    KernelError,
    KernelLibrary,
    StreamShape,
    address,
    device_maps,
    stream_of,
    stream_view,
)
from minicache_trt.kernels.steps import StepTensors
from minicache_trt.model.rope import inverse_frequencies


@dataclass(frozen=True)
class _Reading:
    """One stream as one of its layers reads it; ``maps`` live on the device."""

    layout: StreamLayout
    shape: StreamShape
    maps: dict[str, Tensor]


class KernelCache:
    """Cache pools of an engine on a device, and the kernels that append, attend and compress.

    Parameters
    ----------
    library : KernelLibrary
        The CUDA library for a GPU, the host library for the CPU.
    config : ModelConfig
    plan : CompressionPlan
    device : torch.device
    dtype : torch.dtype
        Compute type: of queries, keys and values, and of ``model`` pools.
    """

    def __init__(
        self,
        library: KernelLibrary,
        config: ModelConfig,
        plan: CompressionPlan,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.library, self.config, self.plan = library, config, plan
        self.device, self.dtype = device, dtype
        self.tensors: dict[str, Tensor] = {}
        self.frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
        self._layouts = plan_layout(plan, config) if plan.compresses else ()
        self._readings: dict[tuple[str, int], _Reading] = {}
        self._writers: list[CompressStream] = []
        for layout in self._layouts:
            self._add_stream(layout)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        """Create zeroed pools with that many blocks and return their bytes; those there were are freed first.

        Raises
        ------
        torch.OutOfMemoryError, RuntimeError
            The device has too little memory.
        """
        self.tensors = {}
        types = {"model": self.dtype, "int8": torch.int8, "float16": torch.float16}
        full, compressed = full_pools(self.config), compressed_pools(self.plan, self.config)
        self.tensors = {
            pool.name: torch.zeros(blocks, *pool.shape, dtype=types[pool.dtype], device=self.device)
            for pools, blocks in ((full, full_blocks), (compressed, compressed_blocks))
            for pool in pools
        }
        return self.num_bytes

    def attend(self, step: StepTensors, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Append, then attend over both tiers: ``PagedAttention``.

        Parameters
        ----------
        step : StepTensors
            Loaded.
        q : Tensor
            ``[T, Hq*D]`` after RoPE, compute type.
        k, v : Tensor
            ``[T, H*D]``, keys after RoPE.
        layer : int

        Returns
        -------
        Tensor
            ``[T, Hq*D]``.

        Raises
        ------
        KernelError
            A kernel does not support this model's shape.
        """
        shape = step.shape
        append_kv(self.library, self.tensors[f"kv.{layer}"], k, v, step.tensors["slot_mapping"])
        q = q.contiguous()
        out = torch.empty_like(q)
        arguments = self._arguments(step, q, out, layer)
        if shape.decodes:
            self._launch("decode", arguments)
        if shape.sequences > shape.decodes:
            self._launch("prefill", arguments)
        return out

    def compress(self, source: Tensor, target: Tensor, block_index: Tensor) -> None:
        """Blocks ``source [N]`` of the full tier into blocks ``target [N]`` of every stream: ``CompressBlocks``."""
        for writer in self._writers:
            full = [self.tensors[f"kv.{layer}"] for layer in writer.layout.stream.layers]
            writer(full, self.tensors, source, target, block_index)

    def _add_stream(self, layout: StreamLayout) -> None:
        matrices = stream_matrices(self.plan.matrices, layout.index)
        readers = []
        for member, layer in enumerate(layout.stream.layers):
            arrays = read_maps(layout, matrices, member)
            readers.append(arrays)
            shape = StreamShape(self.library, layout, member)
            reading = _Reading(layout, shape, device_maps(arrays, self.device))
            self._readings[layout.stream.part, layer] = reading
        maps = write_maps(layout, matrices)
        self._writers.append(CompressStream(self.library, layout, maps, readers, self.config, self.device))

    def _arguments(self, step: StepTensors, q: Tensor, out: Tensor, layer: int) -> structs.AttentionArguments:
        config = self.config
        kv = self.tensors[f"kv.{layer}"]
        arguments = structs.AttentionArguments(
            type=TYPES[self.dtype],
            shape=structs.AttentionShape(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                1 / math.sqrt(config.head_dim),
                address(self.frequencies),
            ),
            step=step.struct(self.plan.compresses),
            kv=address(kv),
            full_blocks=len(kv),
            sliding_window=0,
            q=address(q),
            out=address(out),
            q_stride=q.stride(0),
            out_stride=out.stride(0),
        )
        for part in PARTS if self.plan.compresses else ():
            reading = self._readings[part, layer]
            setattr(arguments, part, stream_view(reading.shape, reading.layout, self.tensors, reading.maps))
        return arguments

    def _launch(self, rows: str, arguments: structs.AttentionArguments) -> None:
        """Attend the step's ``decode`` or ``prefill`` rows."""
        size = self.library.size(f"{rows}_workspace", byref(arguments))
        if size < 0:
            raise KernelError(self.library.last_error())
        workspace = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.library.call(f"{rows}_attention", byref(arguments), address(workspace), size, stream_of(workspace))
