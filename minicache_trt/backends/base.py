"""The protocol every backend implements."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.runtime.batch import Batch, Int32


class Engine(Protocol):
    """A model with its cache pools on one device.

    ``element_bytes`` is the size of a compute-type number in the pools (4 for fp32, 2 for fp16 and bf16).
    """

    model: ModelConfig
    plan: CompressionPlan
    build: BuildConfig
    element_bytes: int

    def free_memory(self) -> int | None:
        """Bytes free on a device with memory of its own, a GPU; None where the cache shares the machine's."""
        ...

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        """Create zeroed pools with that many blocks (block 0 included) and return the bytes allocated."""
        ...

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        """Append the batch's keys and values to the full tier, attend, and return logits ``[N, vocab]``.

        The array may be overwritten by the next call.
        """
        ...

    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        """Compress full-tier blocks ``source_blocks [N]`` into compressed blocks ``target_blocks [N]``, all streams."""
        ...

    def pool(self, name: str) -> NDArray[np.generic]:
        """A pool by its contract name, for inspection; it may change with the next call."""
        ...


@runtime_checkable
class DistributedEngine(Protocol):
    """What an engine of several processes has beside `Engine`."""

    @property
    def failure(self) -> str | None:
        """Why it has ended by itself and computes nothing any more, or None; any thread may ask."""
        ...

    @property
    def cached_model(self) -> ModelConfig:
        """The model with as many KV heads as all processes together keep in their caches, copies included."""
        ...


def cached_model(engine: Engine) -> ModelConfig:
    """The model whose KV heads an engine's cache holds: what bytes of blocks are counted by."""
    return engine.cached_model if isinstance(engine, DistributedEngine) else engine.model


class EngineLost(RuntimeError):
    """Raised by an engine that has ended by itself, for every call from then on."""
