"""TensorRT engines of debugging builds, whose decoder has the trace points as outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.backends.tensorrt.engine import TensorRtEngine
from minicache_trt.engine_directory import EngineInfo
from minicache_trt.errors import UserError
from minicache_trt.kernels.graphs import Recorder, run_again
from minicache_trt.runtime.batch import Batch
from minicache_trt.tracing.points import Trace, trace_points


class TracedTensorRtEngine(TensorRtEngine):
    """Steps run one by one, none is captured: what a step computed is read back after it.

    Raises
    ------
    UserError
        As `TensorRtEngine`, and for an engine that was built without these outputs.
    """

    captured: Trace

    def _start(self, trt: Any, directory: Path, info: EngineInfo, device: torch.device, record: Recorder) -> None:
        super()._start(trt, directory, info, device, run_again)
        missing = [point for point in trace_points(self.model) if point not in self._debug_outputs]
        if missing:
            raise UserError(
                f"{directory}: its decoder does not output {missing[0]}, so its layers cannot be compared",
                "build it with --enable-debug-output",
            )

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self._parts: list[dict[str, NDArray[np.float32]]] = []
        logits = super().decode(batch)
        # Decodes are padded behind the last sequence; chunks are not padded.
        self.captured = {
            point: np.concatenate([part[point] for part in self._parts])[: batch.num_tokens]
            for point in trace_points(self.model)
        }
        return logits

    def _observe(self, outputs: Mapping[str, Tensor]) -> None:
        self._parts.append({point: tensor.cpu().numpy() for point, tensor in outputs.items()})


class TracedTensorRtRtxEngine(TracedTensorRtEngine):
    """The same with TensorRT-RTX."""

    backend = "tensorrt-rtx"


TRACED_TENSORRT = {engine.backend: engine for engine in (TracedTensorRtEngine, TracedTensorRtRtxEngine)}
"""By backend."""
