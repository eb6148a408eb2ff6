"""Engines with a cross-layer compressed, paged KV cache from Hugging Face checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicache_trt.compression.plan import CompressionPlan
    from minicache_trt.config import BuildConfig, KvCacheConfig
    from minicache_trt.errors import UserError
    from minicache_trt.runtime.llm import LLM
    from minicache_trt.runtime.request import RequestOutput
    from minicache_trt.runtime.sampling_params import GuidedDecodingParams, SamplingParams

_EXPORTS = {
    "LLM": "minicache_trt.runtime.llm",
    "GuidedDecodingParams": "minicache_trt.runtime.sampling_params",
    "SamplingParams": "minicache_trt.runtime.sampling_params",
    "RequestOutput": "minicache_trt.runtime.request",
    "KvCacheConfig": "minicache_trt.config",
    "BuildConfig": "minicache_trt.config",
    "CompressionPlan": "minicache_trt.compression.plan",
    "UserError": "minicache_trt.errors",
}

__all__ = [
    "LLM",
    "BuildConfig",
    "CompressionPlan",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "RequestOutput",
    "SamplingParams",
    "UserError",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without loading PyTorch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)
