"""The PyTorch twin of `CompressBlocks` against the independent reference codec."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicache_trt.compression.codec import compress_blocks, restore_blocks
from minicache_trt.compression.packing import pack, unpack
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig
from minicache_trt.contract import plan_layout, stream_layout
from minicache_trt.reference.codec import restore
from tests.support.agreement import assert_blocks_agree
from tests.support.plans import mixed_plan, named_plans

CONFIG = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)
PLANS = named_plans(CONFIG) | {"mixed": mixed_plan(CONFIG)}


def group(stream: Stream, blocks: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Layers that are partly alike, with some outlier channels, as keys have."""
    torch.manual_seed(seed)
    shape = (blocks, CONFIG.num_kv_heads, 64, CONFIG.head_dim)
    common = torch.randn(shape) * torch.rand(CONFIG.head_dim) * 4
    return torch.stack([scale * (common + torch.randn(shape)) for _ in stream.layers])


@pytest.mark.parametrize("name", PLANS)
def test_twin_agrees_with_reference(name: str) -> None:
    for layout in plan_layout(PLANS[name], CONFIG):
        x = group(layout.stream, 3, layout.index)
        block_index = torch.tensor([0, 1, 0])
        fields = compress_blocks(layout, x, block_index)
        expected = assert_blocks_agree(layout, fields, x, block_index)
        restored = torch.cat([restore(block) for block in expected], dim=1)
        for member in range(len(layout.stream.layers)):
            mine = restore_blocks(layout, fields, member, block_index)
            assert (mine - restored[member]).abs().amax() <= 1e-4 * restored.abs().amax()


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.sampled_from(["model", "int8", "int4", "int2"]),
    axis=st.sampled_from(["token", "channel"]),
    merge=st.sampled_from(["none", "mean", "slerp"]),
    norm=st.sampled_from(["head", "token"]),
    retained=st.integers(0, 6),
    sinks=st.integers(0, 6),
    t=st.floats(0.0, 1.0),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 3e5]),
    seed=st.integers(0, 2**20),
)
def test_any_stream_agrees_with_reference(
    fmt: str, axis: str, merge: str, norm: str, retained: int, sinks: int, t: float, scale: float, seed: int
) -> None:
    layers, kept = ((0,), 0) if merge == "none" else ((0, 1), retained)
    segments = (Segment(64, fmt, axis),)
    stream = Stream("key", layers, segments, merge=merge, t=t, norm=norm, retained=kept, sink_tokens=min(sinks, kept))
    layout = stream_layout(0, stream, CONFIG)
    x = group(stream, 2, seed, scale)
    x[-1, 0, 0, 5] = 0.0
    x[-1, 0, :, 9] = -2.0 * x[0, 0, :, 9]
    x[-1, 1, 1, 11] = 3.0 * x[0, 1, 1, 11]
    block_index = torch.tensor([0, 7])
    assert_blocks_agree(layout, compress_blocks(layout, x, block_index), x, block_index)


@given(st.integers(0, 2**30), st.sampled_from([2, 4, 8]))
def test_packing_round_trips(seed: int, bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, 32), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int8 and packed.shape == (3, 2, 32 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_lowest_bits_hold_the_first_code() -> None:
    assert pack(torch.tensor([1, 15], dtype=torch.int32), 4).tolist() == [0xF1 - 128]
    assert pack(torch.tensor([1, 0, 2, 3], dtype=torch.int32), 2).tolist() == [0b11100001 - 128]


def test_fields_have_the_shapes_and_types_of_the_contract() -> None:
    types = {"model": torch.float32, "int8": torch.int8, "float16": torch.float16}
    for plan in PLANS.values():
        for layout in plan_layout(plan, CONFIG):
            fields = compress_blocks(layout, group(layout.stream, 2, 0), torch.tensor([0, 1]))
            assert list(sorted(fields)) == sorted(layout.pools)
            for kind, pool in layout.pools.items():
                assert fields[kind].shape == (2, *pool.shape) and fields[kind].dtype == types[pool.dtype]


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
