"""Limits of a build, memory of a cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from minicache_trt.config.formats import (
    AUTO,
    BACKEND_DTYPES,
    COMPUTE_DTYPES,
    GRAPH_BACKENDS,
    GROUP_SIZES,
    WEIGHT_FORMATS,
)
from minicache_trt.config.model import OVERFLOWING_FAMILIES, ModelConfig
from minicache_trt.errors import UserError

BLOCK_SIZE = 64
"""Tokens per cache block, in both tiers. Contract constant: kernels and functions rely on it."""


@dataclass(frozen=True)
class BuildConfig:
    """Limits an engine is built for.

    Parameters
    ----------
    max_batch_size : int
        Sequences in one step.
    max_seq_len : int
        Prompt plus generated tokens of one sequence.
    max_num_tokens : int
        Tokens in one step over all sequences (prefill chunks and decodes).
    weights : str
        One of ``WEIGHT_FORMATS``.
    group_size : int
        Inputs that share a scale in the weight-only formats, one of ``GROUP_SIZES``.
    backend : str
        Name in ``minicache_trt.backends.BACKENDS``.
    dtype : str
        Compute type, one of ``COMPUTE_DTYPES``; ``auto`` until a build has chosen, see `for_model`.
    window : int
        Most recent tokens kept exact, at least one block.
    quantum : int
        Prompt tokens that attend to one another exactly before they are demoted; a multiple of the block size.
    tp_size : int
        Ranks that compute a step together, each with its share of heads and columns.
    """

    max_batch_size: int = 8
    max_seq_len: int = 4096
    max_num_tokens: int = 2048
    weights: str = "fp32"
    backend: str = "onnxruntime"
    window: int = 64
    quantum: int = 2048
    tp_size: int = 1
    dtype: str = AUTO
    group_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "window", "quantum", "tp_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.max_num_tokens < self.max_batch_size:
            raise ValueError(
                f"max_num_tokens: expected at least max_batch_size ({self.max_batch_size}), got {self.max_num_tokens}"
            )
        if self.quantum % BLOCK_SIZE:
            raise ValueError(f"quantum: expected a multiple of {BLOCK_SIZE}, got {self.quantum}")
        if self.weights not in WEIGHT_FORMATS:
            raise ValueError(f"weights: expected one of {', '.join(WEIGHT_FORMATS)}, got {self.weights!r}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: expected {', '.join(map(str, GROUP_SIZES))}, got {self.group_size}")
        allowed = (AUTO, *BACKEND_DTYPES.get(self.backend, COMPUTE_DTYPES))
        if self.dtype not in allowed:
            raise ValueError(
                f"dtype: expected one of {', '.join(allowed)} with backend {self.backend}, got {self.dtype!r}"
            )

    @property
    def graph_dtype(self) -> str:
        """Compute type of the engine's graphs: float32 for backends that read the checkpoint instead of them."""
        return self.dtype if self.backend in GRAPH_BACKENDS else "float32"

    def for_model(self, config: ModelConfig) -> BuildConfig:
        """With a compute type: float32 on the CPU; on a GPU bfloat16 for such checkpoints, float16 for all others.

        Raises
        ------
        UserError
            float16 was asked for, which the model's activations exceed.
        """
        if self.dtype == "float16" and config.family in OVERFLOWING_FAMILIES:
            raise UserError(
                f"dtype: expected bfloat16 or float32 for {config.family}, whose activations exceed float16's range",
                "leave out --dtype",
            )
        if self.dtype != AUTO:
            return self
        if self.backend in ("onnxruntime", "torch", "host-kernels"):
            return dataclasses.replace(self, dtype="float32")
        return dataclasses.replace(self, dtype=config.half_dtype)


@dataclass(frozen=True)
class KvCacheConfig:
    """Memory for the cache; the call shape of TensorRT-LLM's ``KvCacheConfig``.

    Parameters
    ----------
    max_bytes : int, optional
        Bytes for both tiers together. Default: what ``max_batch_size`` sequences of ``max_seq_len`` tokens need.
    free_gpu_memory_fraction : float
        On a GPU, the cache takes at most this share of the memory that is free once the weights are loaded; the rest
        is for activations.
    active_prefills : int
        Prompts that may hold a whole quantum in the full tier at the same time.
    enable_block_reuse : bool
        Keep blocks that nobody uses until their space is needed, and share blocks with equal contents: a prompt that
        begins like an earlier one is computed from where they differ.
    """

    max_bytes: int | None = None
    free_gpu_memory_fraction: float = 0.9
    active_prefills: int = 1
    enable_block_reuse: bool = True

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes: expected a positive number, got {self.max_bytes}")
        if not 0 < self.free_gpu_memory_fraction < 1:
            raise ValueError(
                f"free_gpu_memory_fraction: expected a number between 0 and 1, got {self.free_gpu_memory_fraction}"
            )
        if self.active_prefills < 1:
            raise ValueError(f"active_prefills: expected a positive number, got {self.active_prefills}")
