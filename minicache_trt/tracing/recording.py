"""From packed steps to arrays by position: what an engine computed for one sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from minicache_trt.backends.base import Engine
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.errors import UserError
from minicache_trt.runtime.batch import Batch, Int32
from minicache_trt.runtime.llm import LLM
from minicache_trt.tracing.engines import TracedEngine
from minicache_trt.tracing.points import Trace, trace_points

Rows = Mapping[str, NDArray[np.float32]]
"""What is kept of one step: name to ``[T, ...]``."""


class RecordingEngine:
    """An `Engine` that hands each step on to another and keeps what ``read`` finds afterwards, by position.

    One sequence runs at a time, so that a position names one token. A token that is computed twice (preemption) is
    kept as it was the last time.

    Parameters
    ----------
    engine : Engine
        With ``max_batch_size`` 1.
    read : callable
        From the batch that has just run to its `Rows`, whose arrays may change with the next step.
    """

    def __init__(self, engine: Engine, read: Callable[[Batch], Rows]) -> None:
        if engine.build.max_batch_size != 1:
            raise ValueError(f"max_batch_size: expected 1, got {engine.build.max_batch_size}")
        self.model, self.plan, self.build = engine.model, engine.plan, engine.build
        self.element_bytes = engine.element_bytes
        self._engine = engine
        self._read = read
        self._recorded: Trace | None = None
        self._length = 0

    def free_memory(self) -> int | None:
        return self._engine.free_memory()

    def allocate(self, full_blocks: int, compressed_blocks: int) -> int:
        return self._engine.allocate(full_blocks, compressed_blocks)

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        logits = self._engine.decode(batch)
        if self._recorded is not None:
            for name, rows in self._read(batch).items():
                if name not in self._recorded:
                    self._recorded[name] = np.zeros((self._length, *rows.shape[1:]), np.float32)
                self._recorded[name][batch.positions] = rows
        return logits

    def compress(self, source_blocks: Int32, target_blocks: Int32, block_index: Int32) -> None:
        self._engine.compress(source_blocks, target_blocks, block_index)

    def pool(self, name: str) -> NDArray[np.generic]:
        return self._engine.pool(name)

    def record(self, llm: LLM, token_ids: list[int], prompt_len: int) -> tuple[Trace, NDArray[np.float32]]:
        """Run ``llm``, which runs this engine, along given tokens (teacher forcing).

        Returns
        -------
        Trace
            Name to ``[len(token_ids), ...]``.
        float32 ``[len(token_ids) - prompt_len + 1, vocab]``
            Logits from the prompt's last token on.

        Raises
        ------
        UserError
            The tokens cannot be used.
        """
        self._recorded, self._length = {}, len(token_ids)
        try:
            (logits,) = llm.score([token_ids], [prompt_len], start=prompt_len - 1)
            return self._recorded, logits
        finally:
            self._recorded = None


def activations(engine: TracedEngine) -> RecordingEngine:
    """Records the trace points."""
    order = tuple(trace_points(engine.model))
    return RecordingEngine(engine, lambda batch: {point: engine.captured[point] for point in order})


def keys_and_values(engine: Engine) -> RecordingEngine:
    """Records ``kv.<layer>`` ``[T, 2, H, D]``: exact keys (after RoPE) and values as they were appended."""
    names = [f"kv.{layer}" for layer in range(engine.model.num_layers)]

    def read(batch: Batch) -> Rows:
        blocks, offsets = np.divmod(batch.slot_mapping, BLOCK_SIZE)
        return {name: engine.pool(name)[blocks, :, :, offsets].astype(np.float32) for name in names}

    return RecordingEngine(engine, read)


def check_finite(trace: Trace) -> None:
    """Raises `UserError`, naming the first array that holds anything but finite numbers."""
    for name, array in trace.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name} holds numbers that are not finite", "check the checkpoint's weights")
