"""`compress_blocks` of the host build against the independent reference codec and the PyTorch twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicache_trt.compression import codec as twin
from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout, stream_layout
from minicache_trt.functions.stream_maps import read_maps, write_maps
from minicache_trt.kernels.codec import CompressStream
from minicache_trt.kernels.library import KernelError, KernelLibrary
from tests.support.agreement import assert_blocks_agree
from tests.support.matrices import random_matrices
from tests.support.plans import all_plans
from tests.support.strategies import streams

CONFIGS = {
    "80": ModelConfig("llama", 4, 64, 64, 6, 2, 80, 100, 4096),
    "128": ModelConfig("llama", 4, 64, 64, 2, 2, 128, 100, 4096),
    "64": ModelConfig("llama", 4, 64, 64, 6, 3, 64, 100, 4096),
}
TYPES = {"80": torch.float32, "128": torch.float16, "64": torch.float16}
SMALL = ModelConfig("llama", 4, 64, 64, 4, 2, 48, 100, 4096)
BLOCKS = ([3, 1, 5], [2, 4, 1], [0, 9, 0])
POISON = 77


def compressor(library: KernelLibrary, plan: CompressionPlan, layout: StreamLayout) -> CompressStream:
    matrices = stream_matrices(plan.matrices, layout.index)
    readers = [read_maps(layout, matrices, member) for member in range(len(layout.stream.layers))]
    return CompressStream(library, layout, write_maps(layout, matrices), readers, layout.config)


def group(layout: StreamLayout, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Full tiers of the stream's layers, partly alike, one vector of the last layer zero."""
    config, generator = layout.config, torch.Generator().manual_seed(seed)
    shape = (7, 2, config.num_kv_heads, 64, config.head_dim)
    common = torch.randn(shape, generator=generator)
    kv = [(common + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in layout.stream.layers]
    kv[-1][1, :, 0, 7] = 0.0
    return kv


def poisoned(layout: StreamLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    types = {"model": dtype, "int8": torch.int8, "float16": torch.float16}
    return {pool.name: torch.full((6, *pool.shape), POISON, dtype=types[pool.dtype]) for pool in layout.pools.values()}


def compressed(
    library: KernelLibrary, plan: CompressionPlan, layout: StreamLayout, kv: list[Tensor]
) -> dict[str, Tensor]:
    """Pools after compressing `BLOCKS`; no other block may have changed."""
    pools = poisoned(layout, kv[0].dtype)
    source, target, number = (torch.tensor(x, dtype=torch.int32) for x in BLOCKS)
    compressor(library, plan, layout)(kv, pools, source, target, number)
    for pool in pools.values():
        assert (pool[[0, 3, 5]] == POISON).all(), "a block that is not a target was written"
    return pools


def check_stream(library: KernelLibrary, plan: CompressionPlan, layout: StreamLayout, kv: list[Tensor]) -> None:
    pools = compressed(library, plan, layout, kv)
    source, target, number = BLOCKS
    fields = {kind: pools[pool.name][target] for kind, pool in layout.pools.items()}
    x = torch.stack([layer[source, PARTS.index(layout.stream.part)] for layer in kv])
    assert_blocks_agree(plan, layout, fields, x, torch.tensor(number), model_dtype=x.dtype)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", all_plans(CONFIGS["80"]))
def test_kernel_agrees_with_reference(host_library: KernelLibrary, name: str, config: str) -> None:
    plan = all_plans(CONFIGS[config])[name]
    seen: set[Stream] = set()
    for layout in plan_layout(plan, CONFIGS[config]):
        kind = replace(layout.stream, layers=tuple(range(len(layout.stream.layers))))
        if kind not in seen:
            check_stream(host_library, plan, layout, group(layout, TYPES[config]))
        seen.add(kind)
