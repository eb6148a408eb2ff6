"""Append, compress and restore against PyTorch and the independent reference codec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from minicache_trt.compression.codec import restore_blocks as twin_restore
from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout
from minicache_trt.functions.stream_maps import read_maps
from minicache_trt.kernels.cache import KernelCache
from minicache_trt.kernels.codec import append_kv, restore_blocks
from minicache_trt.kernels.library import StreamShape, device_maps
from tests.gpu.cases import model
from tests.gpu.conftest import Kernels
from tests.support.agreement import assert_blocks_agree, assert_restored
from tests.support.matrices import random_matrices
from tests.support.plans import all_plans, run_plans

POISON = 77
SOURCE, TARGET, NUMBER = [3, 1, 5], [2, 4, 1], [0, 9, 2047]
TYPES = [torch.float16, torch.bfloat16]
MANY_BLOCKS = [
    "int4 pairs before RoPE",
    "int8x16 int4x32 | g4x16 g3x48 g2x32 g1x32 pre_rope",
    "keys before RoPE",
    "minicache4",
    "kivi4",
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (2, 80), (3, 128), (8, 256)])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_append(kernels: Kernels, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    kv = torch.randn(6, 2, heads, 64, dim).to(dtype)
    joint = torch.randn(tokens, 3 * heads * dim).to(dtype)
    joint[0, ::5], joint[-1, 1::7] = torch.nan, torch.inf
    slots = torch.randperm(6 * 64)[:tokens].to(torch.int32)
    device = kernels.device
    mine, rows = kv.to(device), joint.to(device)
    k, v = rows[:, heads * dim : 2 * heads * dim], rows[:, 2 * heads * dim :]
    append_kv(kernels.library, mine, k, v, slots.to(device))
    new = joint[:, heads * dim :].reshape(tokens, 2, heads, dim)
    kv[slots.long() // 64, :, :, slots.long() % 64] = torch.where(new.isfinite(), new, 0)
    assert torch.equal(mine.cpu(), kv)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("basis", ["pre_rope", "post_rope"])
@pytest.mark.parametrize(("dim", "members", "rank"), [(64, 2, 64), (80, 3, 176), (128, 2, 64), (256, 4, 80)])
def test_products_are_as_exact_as_floats(
    kernels: Kernels, dim: int, members: int, rank: int, basis: str, dtype: torch.dtype
) -> None:
    """Vectors away from zero, columns of very different sizes: codes of int8 as the reference's."""
    config = model(dim, 3)
    segments = (Segment(rank, "int8", axis="channel"),)
    plan = CompressionPlan("custom", (Stream("key", tuple(range(members)), segments, merge="linear", basis=basis),))
    matrices = random_matrices(plan, config)
    sizes = (10.0 ** np.random.default_rng(1).uniform(-1, 6, (3, 1, rank))).astype(np.float32)
    matrices["streams.0.encode"] *= sizes
    matrices["streams.0.decode"] /= sizes.swapaxes(1, 2)
    matrices["streams.0.mean"] *= 1e-3
    plan = replace(plan, matrices=matrices)
    torch.manual_seed(dim)
    center = 2 * torch.randn(dim)
    cache = compressed_cache(kernels, config, plan, dtype, lambda shape: 1e-3 * (center + torch.randn(shape)))
    host = {pool_name: pool.cpu() for pool_name, pool in cache.tensors.items()}
    (layout,) = plan_layout(plan, config)
    assert_compressed(plan, layout, host, dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", all_plans(model()))
def test_compress_and_restore(kernels: Kernels, name: str, dim: int) -> None:
    config = model(dim, 3)
    check_codec(kernels, config, all_plans(config)[name])


@pytest.mark.parametrize("name", run_plans(model(128)))
def test_runs(kernels: Kernels, name: str) -> None:
    """Streams that restoring has kernels of their own for."""
    config = model(128, 3)
    check_codec(kernels, config, run_plans(config)[name])


@pytest.mark.parametrize("name", MANY_BLOCKS)
def test_restoring_many_blocks(kernels: Kernels, name: str) -> None:
    """However many there are, and whichever are left out: the same bits as one by one."""
    config = model(128, 3)
    plan = (run_plans(config) | all_plans(config))[name]
    torch.manual_seed(0)
    cache = compressed_cache(kernels, config, plan, torch.float16, torch.randn)
    blocks = torch.tensor([2, -1, 4, 1, 1, -1, -1, 2, 4, -1, -1, 4, -1, 1, 1, 2, 2], dtype=torch.int32)
    numbers = torch.arange(len(blocks), dtype=torch.int32) * 7
    ids = [blocks.to(kernels.device), numbers.to(kernels.device)]
    for part in PARTS:
        many = cache.restore(part, 0, *ids)
        for n in (blocks >= 0).nonzero()[:, 0].tolist():
            assert torch.equal(many[n], cache.restore(part, 0, *(x[n : n + 1] for x in ids))[0]), (part, n)


@pytest.mark.parametrize("dim", [80, 96])
def test_linear_merges_with_retention_before_rope(kernels: Kernels, dim: int) -> None:
    """Halves of keys that end inside a thread's share of a row."""
    config = model(dim, 3)
    segments = (Segment(48, "int8"), Segment(2 * dim - 48, "drop"))
    stream = Stream("key", (0, 1), segments, merge="linear", basis="pre_rope", retained=4)
    plan = CompressionPlan("custom", (stream,))
    check_codec(kernels, config, replace(plan, matrices=random_matrices(plan, config)))


def compressed_cache(
    kernels: Kernels,
    config: ModelConfig,
    plan: CompressionPlan,
    dtype: torch.dtype,
    numbers: Callable[[torch.Size], Tensor],
) -> KernelCache:
    """A cache with random blocks of every layer, of which some have been compressed."""
    cache = KernelCache(kernels.library, config, plan, kernels.device, dtype)
    cache.allocate(7, 6)
    for name, pool in cache.tensors.items():
        if name.startswith("kv."):
            pool.copy_(numbers(pool.shape))
        else:
            pool.fill_(POISON)
    ids = [torch.tensor(x, dtype=torch.int32, device=kernels.device) for x in (SOURCE, TARGET, NUMBER)]
    kernels.poison_free_memory()
    cache.compress(*ids)
    return cache


def assert_compressed(
    plan: CompressionPlan, layout: StreamLayout, host: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Codes differ from the reference's only at ties, other blocks keep their poison. Returns the compressed blocks."""
    place = PARTS.index(layout.stream.part)
    x = torch.stack([host[f"kv.{layer}"][SOURCE, place] for layer in layout.stream.layers])
    pools = {kind: host[pool.name] for kind, pool in layout.pools.items()}
    assert all((pool[[0, 3, 5]] == POISON).all() for pool in pools.values()), layout.stream
    fields = {kind: pool[TARGET] for kind, pool in pools.items()}
    assert_blocks_agree(plan, layout, fields, x, torch.tensor(NUMBER), dtype)
    return fields


def check_codec(kernels: Kernels, config: ModelConfig, plan: CompressionPlan) -> None:
    """Blocks are compressed as the reference does, and come back as the twin reads them."""
    dtype = torch.float16
    torch.manual_seed(0)
    common = torch.randn(7, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    cache = compressed_cache(kernels, config, plan, dtype, lambda shape: common + 0.5 * torch.randn(shape))
    host = {pool_name: pool.cpu() for pool_name, pool in cache.tensors.items()}
    ids = [torch.tensor(x, dtype=torch.int32, device=kernels.device) for x in (TARGET, NUMBER)]
    for layout in plan_layout(plan, config):
        fields = assert_compressed(plan, layout, host, dtype)
        constants = StreamConstants.of(plan, layout.index)
        for member in range(len(layout.stream.layers)):
            arrays = read_maps(layout, stream_matrices(plan.matrices, layout.index), member)
            maps = device_maps(arrays, kernels.device)
            shape = StreamShape(kernels.library, layout, member)
            mine = restore_blocks(kernels.library, shape, layout, cache.tensors, maps, *ids, config, dtype)
            theirs = twin_restore(layout, fields, member, torch.tensor(NUMBER), constants)
            assert_restored(layout, mine.cpu(), theirs, member)
