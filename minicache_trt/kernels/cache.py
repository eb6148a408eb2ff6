"""The two-tier cache on a device: pools, every stream's shape and maps, and the two custom ops on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import PARTS
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout
from minicache_trt.functions.stream_maps import read_maps, write_maps
from minicache_trt.kernels.attention import attention_arguments, decode_attention, decode_workspace
from minicache_trt.kernels.codec import CompressStream, append_kv, restore_blocks
from minicache_trt.kernels.device_memory import zeroed_pools
from minicache_trt.kernels.library import KernelLibrary, StreamShape, device_maps, stream_view
from minicache_trt.kernels.prefill import prefill_attention, prefill_workspace
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.kernels.structs import AttentionArguments
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
        self._at_layer = [config.at_layer(layer) for layer in range(config.num_layers)]
        self.frequencies = {
            rope: inverse_frequencies(rope, config.head_dim).to(device)
            for rope in dict.fromkeys(own.rope for own in self._at_layer)
        }
        """Of every RoPE of the model, float32 ``[rotary_dim / 2]``."""
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
        blocks = full_blocks, compressed_blocks
        self.tensors = zeroed_pools(self.config, self.plan, blocks, self.dtype, self.device)
        return self.num_bytes

    def warm_up(self) -> None:
        """Launch every layer's and stream's kernels once, on block 0, which no request owns.

        What cannot run on this device fails here and not in a request, and kernels are loaded when the first one comes.

        Raises
        ------
        KernelError
            A kernel does not support this model's shape, or its streams take more shared memory than there is.
        """
        step = StepInputs(StepShape(2, 2, 1, 1, 1, 1, 2), self.device)  # a decode and a chunk of one token
        heads = self.config.num_heads, self.config.num_kv_heads, self.config.num_kv_heads
        q, k, v = (torch.zeros(2, n * self.config.head_dim, dtype=self.dtype, device=self.device) for n in heads)
        for layer in range(self.config.num_layers):
            self.attend(step, q, k, v, layer)
        block = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.compress(block, block, block)

    def attend(self, step: StepInputs, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Append, then attend over both tiers: ``PagedAttention``.

        Parameters
        ----------
        step : StepInputs
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
        append_kv(self.library, self.tensors[f"kv.{layer}"], k, v, step.tensors["slot_mapping"])
        return self.read(step, q, layer)

    def read(self, step: StepInputs, q: Tensor, layer: int) -> Tensor:
        """`attend` without its append: the step's keys and values are in the full tier already."""
        q = q.contiguous()
        out = torch.empty_like(q)
        arguments = self._arguments(step, q, out, layer)
        if step.shape.decodes:
            decode_attention(self.library, arguments, self._scratch(decode_workspace(self.library, arguments)))
        if step.shape.sequences > step.shape.decodes:
            prefill_attention(self.library, arguments, self._scratch(prefill_workspace(self.library, arguments)))
        return out

    def compress(self, source: Tensor, target: Tensor, block_index: Tensor) -> None:
        """Blocks ``source [N]`` of the full tier into blocks ``target [N]`` of every stream: ``CompressBlocks``."""
        for stream in range(len(self._writers)):
            self.compress_stream(stream, source, target, block_index)

    def compress_stream(self, stream: int, source: Tensor, target: Tensor, block_index: Tensor) -> None:
        """`compress` of one stream of the plan."""
        writer = self._writers[stream]
        full = [self.tensors[f"kv.{layer}"] for layer in writer.layout.stream.layers]
        writer(full, self.tensors, source, target, block_index)

    def restore(self, part: str, layer: int, blocks: Tensor, block_index: Tensor) -> Tensor:
        """Keys (after RoPE) or values of a layer's compressed ``blocks [N]``, ``[N, H, B, D]``."""
        own = self._readings[part, layer]
        return restore_blocks(
            self.library,
            own.shape,
            own.layout,
            self.tensors,
            own.maps,
            blocks,
            block_index,
            self.config,
            self.dtype,
            self.frequencies[self._at_layer[layer].rope],
        )

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

    def _arguments(self, step: StepInputs, q: Tensor, out: Tensor, layer: int) -> AttentionArguments:
        views = {}
        for part in PARTS if self.plan.compresses else ():
            reading = self._readings[part, layer]
            views[part] = stream_view(reading.shape, reading.layout, self.tensors, reading.maps)
        own = self._at_layer[layer]
        return attention_arguments(
            own,
            step.attention(self.plan.compresses),
            self.tensors[f"kv.{layer}"],
            q,
            out,
            views.get("key"),
            views.get("value"),
            self.frequencies[own.rope],
            own.sliding_window or 0,
        )

    def _scratch(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=self.device)
