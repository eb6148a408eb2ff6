"""Models of two layers and the plans whose kernels are measured, with matrices of the right shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from minicache_trt.compression.matrices import required
from minicache_trt.compression.methods import METHODS, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import PoolSpec, compressed_pools
from minicache_trt.errors import UserError

MODELS = {
    "Llama-2-7B 32/32/128": ModelConfig("llama", 2, 4096, 11008, 32, 32, 128, 32000, 1 << 17),
    "Llama-3-8B 32/8/128": ModelConfig("llama", 2, 4096, 14336, 32, 8, 128, 128256, 1 << 17),
}
PLANS = (
    "full",
    "kivi4",
    "int4 pairs",
    "KLT pairs post_rope",
    "KLT pairs pre_rope",
    "KLT runs post_rope",
    "KLT runs pre_rope",
    "KLT ranges pre_rope",
    "KLT wide post_rope",
    "KLT wide pre_rope",
)


def plan_of(name: str, config: ModelConfig) -> CompressionPlan:
    """A method, or `plan_of_pairs`."""
    return make_plan(config, name) if name in METHODS else plan_of_pairs(name, config)


def plan_of_pairs(name: str, config: ModelConfig) -> CompressionPlan:
    """Pairs of layers joined by a linear map.

    Half the numbers in int4, a quarter in g4, half in g4, g3 and g2, a quarter in int8 and int4, or three quarters in
    int8, int4 and int2.
    """
    if name not in PLANS or name in METHODS:
        raise UserError(f"unknown plan {name!r}", f"plans: {', '.join((*METHODS, *PLANS))}")
    dim = config.head_dim
    lengths = {
        "int4 pairs": {"int4": dim},
        "KLT pairs": {"g4": dim // 2},
        "KLT runs": {"g4": dim // 4, "g3": dim // 4, "g2": dim // 2},
        "KLT ranges": {"int8": 16, "int4": dim // 2 - 16},
        "KLT wide": {"int8": 16, "int4": 3 * dim // 4 - 16, "int2": 3 * dim // 4},
    }[" ".join(name.split()[:2])]
    segments = tuple(Segment(length, format, transform="hadamard") for format, length in lengths.items())
    basis = "pre_rope" if name.endswith("pre_rope") else "post_rope"
    streams = tuple(
        Stream(part, (first, first + 1), segments, merge="linear", basis=basis if part == "key" else "post_rope")
        for part in PARTS
        for first in range(0, config.num_layers - 1, 2)
    )
    return with_matrices(CompressionPlan("custom", streams), config).validate(config)


def with_matrices(plan: CompressionPlan, config: ModelConfig) -> CompressionPlan:
    """Random orthonormal bases, means of zero and deviations of one: speed does not depend on the values."""
    rng = np.random.default_rng(0)
    result = {}
    for index, stream in enumerate(plan.streams):
        for name, (dtype, shape) in required(stream, config).items():
            if name == "encode":
                basis = np.linalg.qr(rng.standard_normal(shape))[0]
                result[f"streams.{index}.encode"] = np.ascontiguousarray(basis, dtype)
                result[f"streams.{index}.decode"] = np.ascontiguousarray(basis.swapaxes(1, 2), dtype)
            elif name != "decode":
                result[f"streams.{index}.{name}"] = np.full(shape, float(name == "sigma"), dtype)
    return replace(plan, matrices=result)


def random_pool(pool: PoolSpec, blocks: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Numbers a pool may hold."""
    shape = (blocks, *pool.shape)
    if pool.name.endswith("retained_index"):
        return torch.arange(pool.shape[-1], dtype=torch.int8, device=device).expand(shape).contiguous()
    if pool.dtype == "int8":
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    if pool.dtype == "float16":
        return torch.rand(shape, dtype=torch.float16, device=device) * 0.1
    return torch.randn(shape, dtype=dtype, device=device)


def random_cache(
    config: ModelConfig, plan: CompressionPlan, full: int, compressed: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The first layer's full tier and every stream's pools."""
    kv = PoolSpec("kv.0", "model", (2, config.num_kv_heads, BLOCK_SIZE, config.head_dim))
    tensors = {"kv.0": random_pool(kv, full, device, dtype)}
    for pool in compressed_pools(plan, config) if plan.compresses else ():
        tensors[pool.name] = random_pool(pool, compressed, device, dtype)
    return tensors
