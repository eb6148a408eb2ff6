"""The PyTorch twin of `CompressBlocks` against the independent reference codec."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minicache_trt.compression.codec import compress_blocks, restore_blocks
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout, stream_layout
from minicache_trt.reference.codec import restore
from tests.support.agreement import assert_blocks_agree
from tests.support.matrices import random_matrices
from tests.support.plans import all_plans, completed, full_codec_plans, mixed_plan, named_plans
from tests.support.strategies import streams

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)
PLANS = all_plans(CONFIG)
HEAD_DIMS = (64, 80, 128)
# Nothing is lost: with vectors far smaller than the mean, what tokens are retained by is noise.
NOISE = Stream("value", (0,), (Segment(64, "fp8"),), merge="linear", norm="head", retained=1)


def group(stream: Stream, blocks: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Layers that are partly alike, with some outlier channels, as keys have."""
    torch.manual_seed(seed)
    shape = (blocks, CONFIG.num_kv_heads, 64, CONFIG.head_dim)
    common = torch.randn(shape) * torch.rand(CONFIG.head_dim) * 4
    return torch.stack([scale * (common + torch.randn(shape)) for _ in stream.layers])


@pytest.mark.parametrize("name", PLANS)
def test_twin_agrees_with_reference(name: str) -> None:
    plan = PLANS[name]
    for layout in plan_layout(plan, CONFIG):
        x = group(layout.stream, 3, layout.index)
        block_index = torch.tensor([0, 1, 0])
        constants = StreamConstants.of(plan, layout.index)
        fields = compress_blocks(layout, x, block_index, constants)
        expected = assert_blocks_agree(plan, layout, fields, x, block_index)
        restored = torch.cat([restore(block) for block in expected], dim=1)
        for member in range(len(layout.stream.layers)):
            mine = restore_blocks(layout, fields, member, block_index, constants)
            assert (mine - restored[member]).abs().amax() <= 1e-4 * restored.abs().amax()


@settings(max_examples=100, deadline=None)
@given(stream=streams(CONFIG), scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 3e5]), seed=st.integers(0, 2**20))
@example(stream=NOISE, scale=1e-6, seed=0)
def test_any_stream_agrees_with_reference(stream: Stream, scale: float, seed: int) -> None:
    plan = CompressionPlan("custom", (stream,))
    plan = replace(plan, matrices=random_matrices(plan, CONFIG, seed))
    layout = stream_layout(0, stream, CONFIG)
    x = group(stream, 2, seed, scale)
    x[-1, 0, 0, 5] = 0.0
    x[-1, 0, :, 9] = -2.0 * x[0, 0, :, 9]
    x[-1, 1, 1, 11] = 3.0 * x[0, 1, 1, 11]
    block_index = torch.tensor([0, 7])
    fields = compress_blocks(layout, x, block_index, StreamConstants.of(plan, 0))
    assert_blocks_agree(plan, layout, fields, x, block_index)


def shaped(head_dim: int) -> ModelConfig:
    return ModelConfig("llama", 4, 64, 64, 4, 2, head_dim, 100, 4096)


def assert_fields_fit(layout: StreamLayout, fields: dict[str, torch.Tensor], blocks: int) -> None:
    """Shapes, types and bytes of the contract; finite numbers everywhere."""
    types = {"model": torch.float32, "int8": torch.int8, "float16": torch.float16}
    assert sorted(fields) == sorted(layout.pools)
    for kind, pool in layout.pools.items():
        field = fields[kind]
        assert field.shape == (blocks, *pool.shape) and field.dtype == types[pool.dtype]
        assert field.contiguous().nbytes == blocks * pool.block_bytes(4)
        assert field.isfinite().all()


def alike(config: ModelConfig, members: int, blocks: int, seed: int, noise: float = 0.3) -> torch.Tensor:
    torch.manual_seed(seed)
    shape = (blocks, config.num_kv_heads, 64, config.head_dim)
    common = torch.randn(shape)
    return torch.stack([common + noise * torch.randn(shape) for _ in range(members)])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_fields_have_the_shapes_and_types_of_the_contract(head_dim: int) -> None:
    config = shaped(head_dim)
    for plan in (named_plans(config) | full_codec_plans(config) | {"mixed": mixed_plan(config)}).values():
        for layout in plan_layout(plan, config):
            constants = StreamConstants.of(plan, layout.index)
            x, block_index = alike(config, len(layout.stream.layers), 2, layout.index), torch.tensor([0, 5])
            fields = compress_blocks(layout, x, block_index, constants)
            assert_fields_fit(layout, fields, 2)
            for member in range(len(x)):
                restored = restore_blocks(layout, fields, member, block_index, constants)
                assert restored.shape == x[0].shape and restored.isfinite().all()


@settings(max_examples=150, deadline=None)
@given(stream=streams(shaped(48)), seed=st.integers(0, 2**20), scale=st.sampled_from([0.0, 1e-6, 1.0, 3e5]))
def test_any_stream_is_stored_in_its_pools(stream: Stream, seed: int, scale: float) -> None:
    config = shaped(48)
    plan = CompressionPlan("custom", (stream,))
    constants = StreamConstants.of(random_matrices(plan, config, seed), 0)
    layout = stream_layout(0, stream, config)
    x = scale * alike(config, len(stream.layers), 2, seed)
    x[-1, 0, 0, 5] = 0.0
    x[-1, 0, :, 9] = -2.0 * x[0, 0, :, 9]
    block_index = torch.tensor([0, 31])
    fields = compress_blocks(layout, x, block_index, constants)
    assert_fields_fit(layout, fields, 2)
    index = fields.get("retained_index")
    for member in range(len(x)):
        restored = restore_blocks(layout, fields, member, block_index, constants)
        assert restored.isfinite().all()
        if index is None or stream.retained_format != "model":
            continue
        heads = range(config.num_kv_heads) if constants.head_map is None else constants.head_map[member].tolist()
        for n in range(2):
            for slot, head in enumerate(heads):
                own = index[n, slot if len(index[n]) > 1 else 0].long()
                assert torch.equal(restored[n, head, own[own >= 0]], x[member, n, head, own[own >= 0]])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("basis", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_orthonormal_streams_of_full_rank_lose_nothing(head_dim: int, basis: str, transform: str) -> None:
    config = shaped(head_dim)
    options = {"basis": basis, "align": True, "match_heads": True}
    half = Segment(head_dim - 32, transform=transform), Segment(32, transform=transform)
    plan = completed(
        config,
        Stream("key", (1, 3), half * 2, merge="linear", **options),  # type: ignore[arg-type]
        Stream("key", (0,), half, **options),  # type: ignore[arg-type]
        Stream("key", (2,), half, merge="linear", **options),  # type: ignore[arg-type]
        Stream("value", (0, 1, 2), half, merge="slerp", residual="int8", align=True),
    )
    for layout in plan_layout(plan, config):
        constants = StreamConstants.of(plan, layout.index)
        x, block_index = alike(config, len(layout.stream.layers), 3, layout.index), torch.tensor([0, 1, 60])
        fields = compress_blocks(layout, x, block_index, constants)
        tolerance = 0.02 if layout.stream.residual == "int8" else 1e-5
        for member in range(len(x)):
            mine = restore_blocks(layout, fields, member, block_index, constants)
            assert (mine - x[member]).abs().amax() <= tolerance * x.abs().amax()


BOUNDS = {"int8": 0.006, "int4": 0.11, "int2": 0.55, "fp8": 0.03, "g4": 0.11, "g3": 0.2, "g2": 0.36, "g1": 0.62}
"""Relative error of standard normal numbers; gaussian formats: the root of Lloyd and Max's distortion, and some."""


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fmt", BOUNDS)
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_error_of_every_format(head_dim: int, fmt: str, transform: str) -> None:
    config = shaped(head_dim)
    x = alike(config, 1, 4, 0)
    for axis in ("token", "channel"):
        stream = Stream("key", (0,), (Segment(head_dim, fmt, axis, transform),), basis="pre_rope")
        layout = stream_layout(0, stream, config)
        block_index = torch.arange(4)
        restored = restore_blocks(layout, compress_blocks(layout, x, block_index), 0, block_index)
        error = float((restored - x[0]).norm() / x[0].norm())
        assert 0.2 * BOUNDS[fmt] < error < BOUNDS[fmt]


def test_norms_and_deviations_of_linear_gaussian_streams() -> None:
    """Components of very different size: divided by their deviations, all are as exact as one normal number."""
    config = shaped(64)
    stream = Stream("value", (0, 1), (Segment(64, "g4", transform="hadamard"), Segment(64, "g4")), merge="linear")
    plan = CompressionPlan("custom", (stream,))
    matrices = random_matrices(plan, config)
    deviations = np.geomspace(1e-2, 1e2, 128, dtype=np.float32)
    matrices["streams.0.encode"] = np.broadcast_to(np.eye(128, dtype=np.float32), (2, 128, 128)).copy()
    matrices["streams.0.decode"] = matrices["streams.0.encode"]
    matrices["streams.0.sigma"] = np.broadcast_to(deviations, (2, 128)).copy()
    constants, layout = StreamConstants.of(matrices, 0), stream_layout(0, stream, config)
    mean = torch.from_numpy(np.asarray(matrices["streams.0.mean"])).view(2, 2, 64).transpose(0, 1)
    own = torch.from_numpy(deviations).view(2, 64)
    x = torch.randn(2, 3, 2, 64, 64) * own[:, None, None, None] + mean[:, None, :, None]
    block_index = torch.arange(3)
    fields = compress_blocks(layout, x, block_index, constants)
    for member in range(2):
        error = restore_blocks(layout, fields, member, block_index, constants) - x[member]
        assert (error.square().mean((0, 2)).sqrt() / own[member] < 0.16).all()


def test_lossless_streams_restore_exactly() -> None:
    stream = Stream("value", (1,), (Segment(32), Segment(32)))
    layout = stream_layout(0, stream, CONFIG)
    x = group(stream, 2, 3)
    block_index = torch.tensor([0, 1])
    assert torch.equal(restore_blocks(layout, compress_blocks(layout, x, block_index), 0, block_index), x[0])


def test_retained_tokens_are_exact() -> None:
    stream = Stream("key", (0, 1), (Segment(64, "int2", "token"),), merge="slerp", retained=3, sink_tokens=2)
    layout = stream_layout(0, stream, CONFIG)
    x = group(stream, 1, 4)
    block_index = torch.tensor([0])
    fields = compress_blocks(layout, x, block_index)
    for member in range(2):
        restored = restore_blocks(layout, fields, member, block_index)
        for head in range(CONFIG.num_kv_heads):
            index = fields["retained_index"][0, head].long()
            assert {0, 1} <= set(index.tolist())
            assert torch.equal(restored[0, head, index], x[member, 0, head, index])


def test_full_plan_has_no_streams() -> None:
    assert not CompressionPlan("full").compresses
