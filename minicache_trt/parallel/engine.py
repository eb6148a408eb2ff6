"""An engine whose steps several processes compute together."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import TENSORRT_BACKENDS, BuildConfig, ModelConfig
from minicache_trt.contract import PoolSpec, compressed_pools, full_pools
from minicache_trt.engine_directory import EngineInfo
from minicache_trt.errors import UserError
from minicache_trt.functions.form import COMPUTE_TYPES
from minicache_trt.parallel.processes import RankProcesses
from minicache_trt.parallel.shard import Shard, check_shardable, shard_model, shard_plan
from minicache_trt.runtime.batch import Batch, Int32

TENSOR_PARALLEL_BACKENDS = ("cuda", "torch", "host-kernels", *TENSORRT_BACKENDS)
"""Backends that can be cut into ranks."""


def check_ranks(model: ModelConfig, plan: CompressionPlan, build: BuildConfig) -> None:
    """Refuse an engine that cannot be cut into as many ranks as it is to have.

    Raises
    ------
    UserError
        The backend runs a single rank, or the model or its plan cannot be cut.
    """
    _check_backend(build.backend, build.tp_size)
    check_shardable(model, plan, build.tp_size)


def _check_backend(backend: str, size: int) -> None:
    if size > 1 and backend not in TENSOR_PARALLEL_BACKENDS:
        raise UserError(
            f"backend {backend} runs one rank, and the engine is for tp_size {size}",
            f"backends for several ranks: {', '.join(TENSOR_PARALLEL_BACKENDS)}; or build it with --tp-size 1",
        )


class TensorParallelEngine:
    """Implements `minicache_trt.backends.base.Engine` over processes of one rank each, a process group per engine.

    Block tables, slots and demotions are the same for all ranks; every rank keeps its heads' share of each block, so
    the cache's bytes are those of one rank's engine, spread out; where ranks outnumber KV heads, times the ranks that
    hold copies of one. Each step, the packed inputs go to all ranks and the logits come back from the first.

    Parameters
    ----------
    directory : Path
    info : EngineInfo
    backend : str
        One of ``TENSOR_PARALLEL_BACKENDS``.
    num_threads : int, optional
        Of each rank. Default: the machine's cores, shared out.

    Raises
    ------
    UserError
        The model or its plan cannot be cut, or a rank cannot load its share.
    """

    def __init__(self, directory: Path, info: EngineInfo, backend: str, num_threads: int | None = None) -> None:
        size = info.build.tp_size
        check_ranks(info.model, info.plan, replace(info.build, backend=backend))
        self.directory = directory
        self.model, self.plan, self.build = info.model, info.plan, info.build
        self.element_bytes = _element_bytes(backend, info.build)
        self._shard = Shard.of(self.model, 0, size)
        self._ranks = RankProcesses(directory, backend, num_threads or _threads_per_rank(size), size)

    def free_memory(self) -> int | None:
        free: list[int | None] = self._ranks.call("free_memory")
        known = [number for number in free if number is not None]
        return min(known) * self._shard.size if known else None

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        return sum(self._ranks.call("allocate", full_blocks, compressed_blocks))

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = self._ranks.call("decode", batch)[0]
        return logits

    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        self._ranks.call("compress", source_blocks, target_blocks, block_index)

    def pool(self, name: str) -> NDArray[np.generic]:
        """All heads of a pool, put together from the ranks'; a copy."""
        parts = self._ranks.call("pool", name)[:: self._shard.kv_copies]
        array: NDArray[np.generic] = np.concatenate(parts, self._head_axis(name)) if len(parts) > 1 else parts[0]
        return array

    @property
    def processes(self) -> tuple[subprocess.Popen[bytes], ...]:
        """The ranks' processes, in their order."""
        return self._ranks.processes

    @property
    def failure(self) -> str | None:
        """See `minicache_trt.backends.base.DistributedEngine`."""
        return self._ranks.failure

    @property
    def cached_model(self) -> ModelConfig:
        """Likewise."""
        return replace(self.model, num_kv_heads=self.model.num_kv_heads * self._shard.kv_copies)

    def close(self) -> None:
        """End the ranks; also when the engine is forgotten, or its process ends."""
        self._ranks.close()

    def _head_axis(self, name: str) -> int:
        """The axis along which one rank's pool differs from the whole one."""
        whole = self._specs(self.model, self.plan)[name].shape
        plan = shard_plan(self.plan, self.model, self._shard)
        own = self._specs(shard_model(self.model, self._shard), plan)[name].shape
        return 1 + next(axis for axis, (a, b) in enumerate(zip(whole, own, strict=True)) if a != b)

    @staticmethod
    def _specs(model: ModelConfig, plan: CompressionPlan) -> dict[str, PoolSpec]:
        return {pool.name: pool for pool in (*full_pools(model), *compressed_pools(plan, model))}


def _element_bytes(backend: str, build: BuildConfig) -> int:
    """Of a number of the compute type."""
    if backend in TENSORRT_BACKENDS:
        return int(COMPUTE_TYPES[build.graph_dtype].itemsize)
    return 2 if backend == "cuda" else 4


def _threads_per_rank(size: int) -> int:
    return max(1, (os.cpu_count() or 1) // size)
