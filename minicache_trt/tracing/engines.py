"""Engines that keep what they computed at the trace points in their latest step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.backends import open_backend
from minicache_trt.backends.base import Engine
from minicache_trt.backends.onnxruntime import OnnxRuntimeEngine, bind_buffer, open_session
from minicache_trt.backends.torch_reference import TorchEngine
from minicache_trt.config import TENSORRT_BACKENDS, ModelConfig
from minicache_trt.engine_directory import DECODER, EngineInfo
from minicache_trt.errors import UserError
from minicache_trt.model.torch_ops import Attention, TorchOps
from minicache_trt.runtime.batch import Batch
from minicache_trt.tracing.decoder_graph import traced_decoder
from minicache_trt.tracing.points import (
    Trace,
    attention_point,
    norm_inputs,
    output_point,
    trace_points,
)


class TracedEngine(Engine, Protocol):
    """An engine whose ``captured`` holds each trace point ``[T, width]`` of the latest step, in packed order."""

    captured: Trace


_Open = Callable[[Path, EngineInfo, int | None], TracedEngine]


class TracedOnnxRuntimeEngine(OnnxRuntimeEngine):
    """ONNX Runtime with the trace points as additional outputs.

    A value that is an output is computed in the open: fusions across it do not happen, everything else is the graph
    that runs otherwise.
    """

    captured: Trace

    def decode(self, batch: Batch) -> NDArray[np.float32]:
        self.captured = {
            point: np.empty((batch.num_tokens, width), np.float32) for point, width in trace_points(self.model).items()
        }
        for point, array in self.captured.items():
            bind_buffer(self._decoder_binding.bind_output, point, array)
        return super().decode(batch)

    def _open_decoder(self, num_threads: int | None) -> ort.InferenceSession:
        path = self.directory / DECODER
        return open_session(path, num_threads, traced_decoder(path, self.model))


class TracedTorchEngine(TorchEngine):
    """PyTorch with operations that take notes."""

    captured: Trace

    def _ops(self, attention: Attention) -> TorchOps:
        self.captured = {}
        return _TracedOps(self.model, self._weights, attention, self.captured)


class _TracedOps(TorchOps):
    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], attention: Attention, captured: Trace
    ) -> None:
        super().__init__(config, weights, attention)
        self._points = norm_inputs(config)
        self._last = output_point(config.num_layers - 1)
        self._captured = captured

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        if name in self._points:
            self._captured[self._points[name]] = x.float().numpy()
        return super().rms_norm(x, name)

    def paged_attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        out = super().paged_attention(q, k, v, layer)
        self._captured[attention_point(layer)] = out.float().numpy()
        return out

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        self._captured[self._last] = x.float().numpy()
        return super().take(x, rows)


def _tensorrt(backend: str) -> _Open:
    def open_engine(directory: Path, info: EngineInfo, num_threads: int | None) -> TracedEngine:
        from minicache_trt.tracing.tensorrt_engine import TRACED_TENSORRT

        return TRACED_TENSORRT[backend](directory, info, num_threads)

    return open_engine


TRACED: dict[str, _Open] = {
    "onnxruntime": TracedOnnxRuntimeEngine,
    "torch": TracedTorchEngine,
    **{backend: _tensorrt(backend) for backend in TENSORRT_BACKENDS},
}
"""Backend name to what opens an engine that can be traced."""


def open_traced(directory: Path, info: EngineInfo, num_threads: int | None, backend: str) -> TracedEngine:
    """Load an engine directory on a backend that can be traced, for one sequence at a time.

    Raises
    ------
    UserError
        The backend is unknown or cannot be traced, or the engine cannot be loaded.
    """
    if backend not in TRACED:
        open_backend(backend)
        raise UserError(f"backend {backend!r} cannot be traced layer by layer", f"traced: {', '.join(TRACED)}")
    return TRACED[backend](directory, one_at_a_time(info), num_threads)


def one_at_a_time(info: EngineInfo) -> EngineInfo:
    """The same engine with a batch of one: a trace is of one sequence, and the cache need hold no other."""
    return replace(info, build=replace(info.build, max_batch_size=1))
