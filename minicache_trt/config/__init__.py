"""Frozen configuration: the model's shape, the build's limits, the cache's budget."""

from __future__ import annotations

from minicache_trt.config.build import BLOCK_SIZE, BuildConfig, KvCacheConfig
from minicache_trt.config.formats import (
    AUTO,
    BACKEND_DTYPES,
    CALIBRATED_WEIGHTS,
    COMPUTE_DTYPES,
    GPU_BACKENDS,
    GRAPH_BACKENDS,
    GROUP_SIZES,
    ROW_FORMATS,
    TENSORRT_BACKENDS,
    WEIGHT_BITS,
    WEIGHT_FORMATS,
    WEIGHT_TYPES,
)
from minicache_trt.config.model import ACTIVATIONS, OVERFLOWING_FAMILIES, ModelConfig, RopeConfig

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "BACKEND_DTYPES",
    "BLOCK_SIZE",
    "CALIBRATED_WEIGHTS",
    "COMPUTE_DTYPES",
    "GPU_BACKENDS",
    "GRAPH_BACKENDS",
    "GROUP_SIZES",
    "OVERFLOWING_FAMILIES",
    "ROW_FORMATS",
    "TENSORRT_BACKENDS",
    "WEIGHT_BITS",
    "WEIGHT_FORMATS",
    "WEIGHT_TYPES",
    "BuildConfig",
    "KvCacheConfig",
    "ModelConfig",
    "RopeConfig",
]
