"""Traces and recorded keys and values of an engine directory, for given tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minicache_trt.engine_directory import read_engine
from minicache_trt.runtime.llm import LLM
from minicache_trt.tracing.engines import open_traced
from minicache_trt.tracing.points import Trace
from minicache_trt.tracing.recording import RecordingEngine, activations


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 101, count).tolist()


def record(
    directory: Path,
    token_ids: list[int],
    prompt_len: int,
    backend: str = "onnxruntime",
    recorder: Callable[..., RecordingEngine] = activations,
) -> tuple[Trace, NDArray[np.float32]]:
    """The trace, and the logits from the prompt's last token on."""
    engine = recorder(open_traced(directory, read_engine(directory), 1, backend))
    return engine.record(LLM.from_engine(engine), token_ids, prompt_len)
