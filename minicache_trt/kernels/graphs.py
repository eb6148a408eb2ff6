"""Steps that are captured once and replayed: launching a step's kernels one by one can cost more than running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicache_trt.config import BLOCK_SIZE, BuildConfig
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.runtime.batch import Batch, Int32

Run = Callable[[], Tensor]
"""Computes from tensors at fixed addresses, and returns a tensor at a fixed address."""
Recorder = Callable[[Run], Run]
"""From a computation to one that does the same again, on what the same tensors hold then."""

_FINE = 8


def bucket(count: int, limit: int) -> int:
    """Smallest of 1, 2, 4, 8, 16, 24, 32, ... that is at least ``count``, at most ``limit``."""
    return wide_bucket(count, limit) if count <= _FINE else min(-(-count // _FINE) * _FINE, limit)


def wide_bucket(count: int, limit: int) -> int:
    """Smallest power of two that is at least ``count``, at most ``limit``."""
    return min(1 << max(count - 1, 0).bit_length(), limit)


def run_again(run: Run) -> Run:
    """A recorder that captures nothing: each replay computes step by step."""
    return run


class CudaRecorder:
    """Captures computations into CUDA graphs that share one pool of memory; they must not run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up in their first call, which cannot be captured
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True)
class GraphLimits:
    """Largest step of decodes: sequences, and columns of either block table."""

    sequences: int
    full_columns: int
    compressed_columns: int

    @classmethod
    def of(cls, build: BuildConfig, compresses: bool) -> GraphLimits:
        """What an engine's batches can have; decodes hold all but their window in the compressed tier, if there is one.

        A sequence that still reads its prompt exactly holds more; it shares the widest table.
        """
        longest = -(-build.max_seq_len // BLOCK_SIZE)
        return cls(build.max_batch_size, longest, longest if compresses else 1)

    def shape(self, batch: Batch) -> StepShape:
        """The bucket of a batch of decodes."""
        return StepShape.of_decodes(
            bucket(len(batch.context_len), self.sequences),
            wide_bucket(batch.full_table.shape[1], self.full_columns),
            wide_bucket(batch.compressed_table.shape[1], self.compressed_columns),
        )


class DecodeGraphs:
    """Steps of decodes by shape, padded to buckets and replayed.

    Parameters
    ----------
    limits : GraphLimits
    compute : callable
        From a step's tensors to its logits ``[rows, vocab]``; what it returns may be overwritten by the next call.
    record : Recorder
    device : torch.device
    """

    def __init__(
        self, limits: GraphLimits, compute: Callable[[StepInputs], Tensor], record: Recorder, device: torch.device
    ) -> None:
        self._limits = limits
        self._compute = compute
        self._record = record
        self._device = device
        self._steps: dict[StepShape, tuple[StepInputs, Run]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __call__(self, batch: Batch) -> Tensor:
        """Logits ``[sequences, vocab]`` of a batch of decodes, one row for each, wanted or not."""
        shape = self._limits.shape(batch)
        if shape not in self._steps:
            tensors = StepInputs(shape, self._device)
            self._steps[shape] = tensors, self._record(partial(self._compute, tensors))
        tensors, replay = self._steps[shape]
        tensors.load(batch)
        return replay()[: len(batch.context_len)]


class CompressGraphs:
    """Compressions by number of blocks, padded with block 0, which no request owns, and replayed.

    Parameters
    ----------
    compute : callable
        Compresses int32 blocks ``source, target, block_index [N]``.
    record : Recorder
    device : torch.device
    limit : int
        Blocks compressed at a time; more are compressed in turns.
    """

    def __init__(
        self, compute: Callable[[Tensor, Tensor, Tensor], None], record: Recorder, device: torch.device, limit: int = 64
    ) -> None:
        self._compute = compute
        self._record = record
        self._device = device
        self._limit = limit
        self._steps: dict[int, tuple[Tensor, Run]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def __call__(self, source: Int32, target: Int32, block_index: Int32) -> None:
        blocks = np.stack([source, target, block_index])
        for start in range(0, blocks.shape[1], self._limit):
            self._compress(blocks[:, start : start + self._limit])

    def _compress(self, blocks: Int32) -> None:
        count = blocks.shape[1]
        size = wide_bucket(count, self._limit)
        if size not in self._steps:
            inputs = torch.zeros(3, size, dtype=torch.int32, device=self._device)
            self._steps[size] = inputs, self._record(partial(self._run, inputs))
        inputs, replay = self._steps[size]
        padded = np.zeros((3, size), np.int32)
        padded[:, :count] = blocks
        inputs.copy_(torch.from_numpy(padded))
        replay()

    def _run(self, inputs: Tensor) -> Tensor:
        source, target, block_index = inputs
        self._compute(source, target, block_index)
        return inputs
