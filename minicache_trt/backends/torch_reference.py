"""The reference backend: the same decoder, eager PyTorch, every custom op by its PyTorch twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.backends.torch_weights import load_weights
from minicache_trt.compression.codec import compress_blocks
from minicache_trt.compression.stream import PARTS
from minicache_trt.contract import compressed_pools, full_pools
from minicache_trt.engine_directory import EngineInfo
from minicache_trt.errors import UserError
from minicache_trt.model.decoder import decoder
from minicache_trt.model.torch_attention import Pools, paged_attention
from minicache_trt.model.torch_ops import Attention, TorchOps
from minicache_trt.parallel.rank import ONE_RANK, Rank
from minicache_trt.runtime.batch import Batch, Int32

_POOL_TYPES = {"model": torch.float32, "int8": torch.int8, "float16": torch.float16}


class TorchEngine:
    """Implements `minicache_trt.backends.base.Engine` in float32 on the CPU.

    It follows the specification, not the clock: sequences are attended to one by one and history is restored in full.
    Weight-only formats are dequantized when loaded (activations stay float32).

    Parameters
    ----------
    directory : Path
    info : EngineInfo
    num_threads : int, optional
        Default: PyTorch's own choice. The setting is PyTorch's, for the whole process.
    rank : Rank
        Which of the engine's ranks this process is.
    """

    element_bytes = 4

    def __init__(
        self, directory: Path, info: EngineInfo, num_threads: int | None = None, rank: Rank = ONE_RANK
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.directory = directory
        self.model, self.plan, self.build = rank.model(info.model), rank.plan(info), info.build
        self._ranks = rank.collectives
        self._weights = load_weights(directory, torch.device("cpu"), torch.float32, rank.shard)
        self._pools = Pools.of(self.model, self.plan, {})

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        full, compressed = full_pools(self.model), compressed_pools(self.plan, self.model)
        try:
            tensors = {
                pool.name: torch.zeros(blocks, *pool.shape, dtype=_POOL_TYPES[pool.dtype])
                for pools, blocks in ((full, full_blocks), (compressed, compressed_blocks))
                for pool in pools
            }
        except RuntimeError as error:  # PyTorch's allocator raises nothing more specific on the CPU
            raise UserError("the machine has too little memory for the cache", "lower --kv-cache-memory") from error
        self._pools = Pools.of(self.model, self.plan, tensors)
        return sum(tensor.nbytes for tensor in tensors.values())

    @torch.inference_mode()
    def decode(self, batch: Batch) -> NDArray[np.float32]:
        def attention(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            return paged_attention(self._pools, batch, q, k, v, layer)

        ops = self._ops(attention)
        ids, positions, rows = (torch.from_numpy(x) for x in (batch.input_ids, batch.positions, batch.logit_index))
        logits: NDArray[np.float32] = decoder(self.model, ops, ids, positions, rows).numpy()
        return logits

    def _ops(self, attention: Attention) -> TorchOps:
        """The decoder's operations; a tracing engine takes note of what they compute."""
        return TorchOps(self.model, self._weights, attention, self._ranks)

    @torch.inference_mode()
    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        source, target = torch.from_numpy(source_blocks).long(), torch.from_numpy(target_blocks).long()
        for layout, constants in zip(self._pools.layouts, self._pools.constants, strict=True):
            place = PARTS.index(layout.stream.part)
            x = torch.stack([self._pools.tensors[f"kv.{layer}"][source, place] for layer in layout.stream.layers])
            for kind, values in compress_blocks(layout, x, torch.from_numpy(block_index), constants).items():
                self._pools.tensors[layout.pools[kind].name][target] = values

    def free_memory(self) -> int | None:
        return None

    def pool(self, name: str) -> NDArray[np.generic]:
        """A pool by its contract name, for inspection."""
        array: NDArray[np.generic] = self._pools.tensors[name].numpy()
        return array
