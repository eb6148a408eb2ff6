"""An engine against another side, layer by layer, along the engine's own greedy continuation of some prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minicache_trt.compare import greedy_continuations
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import KvCacheConfig
from minicache_trt.engine_directory import EngineInfo, read_engine
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.tracing.divergence import LOGITS, Divergence, diverge
from minicache_trt.tracing.engines import open_traced
from minicache_trt.tracing.points import Trace
from minicache_trt.tracing.recording import RecordingEngine, activations

TORCH, UNCOMPRESSED = "torch", "uncompressed"
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-3, "bf16": 1e-3, "int8": 0.1, "int4": 0.1, "int4_awq": 0.1, "fp8": 0.1}
"""Default tolerance by weight format. Weight-only kernels round activations to 8 bits, PyTorch here does not."""
DTYPE_TOLERANCES = {"float32": 0.0, "float16": 2e-2, "bfloat16": 0.1}
"""The least default tolerance by compute type: two roundings apart, over some layers."""
COARSE_CODES, COARSE_TOLERANCE = 2, 1e-2
"""Where codes have so few bits, a number on the boundary between two of them, which two correct implementations may
round differently, moves an attention output by more than 1e-3."""


@dataclass(frozen=True)
class Side:
    """An engine directory, what to take it for, and the backend that runs it."""

    directory: Path
    info: EngineInfo
    backend: str

    def record(self, num_threads: int | None) -> RecordingEngine:
        """Load it; see `minicache_trt.tracing.engines.open_traced`."""
        return activations(open_traced(self.directory, self.info, num_threads, self.backend))

    def __str__(self) -> str:
        return f"{self.directory} ({self.info.plan.method}, {self.info.build.weights} weights) on {self.backend}"


def other_side(directory: Path, info: EngineInfo, against: str) -> Side:
    """Side B.

    Parameters
    ----------
    directory : Path
    info : EngineInfo
        Side A.
    against : str
        ``torch`` (the same engine on the reference backend), ``uncompressed`` (the same, without compression), or
        another engine directory of the same model.

    Raises
    ------
    UserError
        It is none of these, or of another model.
    """
    if against == TORCH:
        return Side(directory, info, "torch")
    if against == UNCOMPRESSED:
        return Side(directory, replace(info, plan=CompressionPlan("full")), "torch")
    path = Path(against)
    if not against or not path.exists():
        raise UserError(
            f"--against: {against!r} is no engine directory",
            f"use {TORCH}, {UNCOMPRESSED} or another engine of the same model",
        )
    other = read_engine(path)
    if other.model != info.model:
        mine, theirs = info.model.to_dict(), other.model.to_dict()
        names = [name for name, value in mine.items() if theirs[name] != value]
        raise UserError(
            f"--against: {against} is of another model than {directory}: "
            + ", ".join(f"{name} {theirs[name]}, not {mine[name]}" for name in names[:3]),
            "layers can be compared between engines of one model",
        )
    return Side(path, other, other.build.backend)


def default_tolerance(a: Side, b: Side) -> float:
    """Beyond the rounding of both sides."""
    bits = {segment.bits for side in (a, b) for stream in side.info.plan.streams for segment in stream.segments}
    coarse = any(0 < number <= COARSE_CODES for number in bits)
    weights = max(TOLERANCES[side.info.build.weights] for side in (a, b))
    dtype = max(DTYPE_TOLERANCES[side.info.build.graph_dtype] for side in (a, b))
    return max(weights, dtype, COARSE_TOLERANCE if coarse else 0.0)


def compare_layers(
    llm: LLM,
    recording: RecordingEngine,
    b: Side,
    prompts: Sequence[str | list[int]],
    max_tokens: int,
    tolerance: float,
    num_threads: int | None,
    progress: Callable[[int, int], None],
) -> Divergence:
    """Trace both sides along the same tokens and compare them point by point.

    Parameters
    ----------
    llm : LLM
        Side A, running ``recording``.
    recording : RecordingEngine
    b : Side
        Loaded when side A has been traced.
    prompts : sequence of str or list of int
    max_tokens : int
        Tokens with which side A continues each prompt, greedily.
    tolerance : float
        Of the relative error.
    num_threads : int, optional
        Of side B.
    progress : callable
        Called with traces done and traces in all.

    Raises
    ------
    UserError
        A prompt cannot be used by one of the sides, or side B cannot be loaded.
    """
    sequences, prompt_lens = greedy_continuations(llm, prompts, max_tokens)
    limit, longest = b.info.build.max_seq_len, max(map(len, sequences))
    if longest > limit:
        raise UserError(
            f"{b.directory} was built for max_seq_len {limit}, prompt and continuation have {longest} tokens",
            "shorten the prompts, or lower --max-tokens",
        )
    total = 2 * len(sequences)

    def trace(runner: LLM, engine: RecordingEngine, done: int) -> list[Trace]:
        traces = []
        for index, (tokens, prompt_len) in enumerate(zip(sequences, prompt_lens, strict=True)):
            progress(done + index, total)
            recorded, logits = engine.record(runner, tokens, prompt_len)
            traces.append({**recorded, LOGITS: logits[:-1]})  # the last row predicts past the continuation
        return traces

    mine = trace(llm, recording, 0)
    other = b.record(num_threads)
    theirs = trace(LLM.from_engine(other, kv_cache_config=KvCacheConfig()), other, len(sequences))
    progress(total, total)
    return diverge(mine, theirs, [(p, len(t)) for p, t in zip(prompt_lens, sequences, strict=True)], tolerance)
