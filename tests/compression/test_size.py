"""Cache sizes, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicache_trt.compression.codec import compress_blocks
from minicache_trt.compression.methods import METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.size import (
    baseline_bytes_per_token,
    bytes_per_token,
    constant_bytes,
    context_that_fits,
    layer_costs,
    ratio,
    sequence_bytes,
)
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import (
    compressed_block_bytes,
    compressed_pools,
    full_block_bytes,
    full_pools,
    stream_layout,
)
from minicache_trt.runtime.block_pool import BlockPool
from minicache_trt.runtime.demotion import DemotionRule
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.tiered_cache import TieredCache
from tests.support.matrices import random_matrices
from tests.support.strategies import streams

LLAMA2_7B = ModelConfig("llama", 32, 4096, 11008, 32, 32, 128, 32000, 4096)
TINY = ModelConfig("llama", 5, 64, 64, 4, 2, 32, 100, 4096)


def test_baseline_is_sixteen_bit_keys_and_values() -> None:
    assert baseline_bytes_per_token(LLAMA2_7B) == 2 * 32 * 32 * 128 * 2


def test_minicache4_of_llama2_7b_by_hand() -> None:
    """A block of the paper's plan at merge start 16 with 4-bit KIVI, counted stream by stream."""
    heads, dim, block, retained = 32, 128, 64, 3
    codes = heads * block * dim // 2
    key_ranges, value_ranges = heads * 2 * dim * 2, heads * 2 * block * 2
    extra = 2 * heads * block * 2 + 2 * heads * retained * dim * 2 + heads * retained
    single, pair = 2 * codes + key_ranges + value_ranges, 2 * codes + key_ranges + value_ranges + 2 * extra
    assert compressed_block_bytes(make_plan(LLAMA2_7B, "minicache4"), LLAMA2_7B, 2) == 16 * single + 8 * pair


def test_half_depth_merging_alone_saves_little() -> None:
    """24 of 32 layers' worth of storage, plus norms and retained tokens (about 1.3x)."""
    plan = make_plan(LLAMA2_7B, "minicache", MethodOptions(merge_start=16))
    assert 1.25 < ratio(plan, LLAMA2_7B, 4096, 64) < 4 / 3


@pytest.mark.parametrize("method", METHODS)
def test_pool_shapes_multiply_to_block_bytes(method: str) -> None:
    plan = make_plan(TINY, method)
    sizes = {"model": 4, "int8": 1, "float16": 2}

    def total(pools: tuple) -> int:  # type: ignore[type-arg]
        result = 0
        for pool in pools:
            numbers = 1
            for extent in pool.shape:
                numbers *= extent
            result += numbers * sizes[pool.dtype]
        return result

    assert compressed_block_bytes(plan, TINY, 4) == total(compressed_pools(plan, TINY))
    assert full_block_bytes(TINY, 4) == total(full_pools(TINY)) == 5 * 2 * 2 * BLOCK_SIZE * 32 * 4


@settings(max_examples=100, deadline=None)
@given(stream=streams(TINY), element=st.sampled_from([torch.float16, torch.float32]))
def test_stored_bytes_are_the_pools(stream: Stream, element: torch.dtype) -> None:
    constants = StreamConstants.of(random_matrices(CompressionPlan("custom", (stream,)), TINY), 0)
    layout = stream_layout(0, stream, TINY)
    x = torch.randn(len(stream.layers), 1, TINY.num_kv_heads, BLOCK_SIZE, TINY.head_dim).to(element)
    fields = compress_blocks(layout, x, torch.tensor([0]), constants)
    assert {kind: field.contiguous().nbytes for kind, field in fields.items()} == {
        kind: pool.block_bytes(element.itemsize) for kind, pool in layout.pools.items()
    }


@pytest.mark.parametrize(
    ("streams_bits", "segments"),
    [
        (4 * 32 + 2 * 64 + 16, (Segment(32, "g4", transform="hadamard"), Segment(64, "g2"))),
        (3 * 48 + 16, (Segment(48, "g3"), Segment(16, "drop"))),
        (1 * 64 + 16, (Segment(64, "g1"),)),
        (4 * 48 + 8 * 16 + 2 * 16 + 16, (Segment(48, "int4"), Segment(32, "drop"), Segment(16, "fp8"))),
    ],
)
def test_bits_per_token_and_head_by_hand(streams_bits: int, segments: tuple[Segment, ...]) -> None:
    """Codes, then 16 bits for a norm, or 16 for each scale and minimum."""
    layout = stream_layout(0, Stream("key", (0, 1, 3), segments, merge="linear"), TINY)
    size = sum(pool.block_bytes(2) for pool in layout.pools.values())
    assert size * 8 == streams_bits * BLOCK_SIZE * TINY.num_kv_heads


def test_constants_are_counted_once() -> None:
    plan = make_plan(TINY, "smoothquant")
    per_layer = 2 * (2 * 32 * 32 + 32) * 4
    assert constant_bytes(plan) == 5 * per_layer
    assert constant_bytes(make_plan(TINY, "hadamard2")) == 0


@given(context=st.integers(1, 5000), window=st.integers(1, 300), method=st.sampled_from(list(METHODS)))
def test_sequence_bytes_count_whole_blocks(context: int, window: int, method: str) -> None:
    plan = make_plan(TINY, method)
    size = sequence_bytes(plan, TINY, context, window)
    compressed = 0 if not plan.compresses else max(0, context - window) // BLOCK_SIZE
    exact = -(-(context - compressed * BLOCK_SIZE) // BLOCK_SIZE)
    expected = compressed * compressed_block_bytes(plan, TINY, 2) + exact * full_block_bytes(TINY, 2)
    assert size == expected
    assert bytes_per_token(plan, TINY, context, window) * context == pytest.approx(size)


@pytest.mark.parametrize("method", ["full", "kivi4"])
def test_layers_without_a_window_keep_every_block(method: str) -> None:
    """A 16-bit cache would still free what the others no longer see: that is what ratios are against."""
    mixed = replace(TINY, sliding_window=300, full_layers=(1, 4))
    plan, layer = make_plan(TINY, method), full_block_bytes(TINY, 2) / BLOCK_SIZE / 5
    assert sequence_bytes(plan, mixed, 1000, 64) == sequence_bytes(plan, TINY, 1000, 64)
    assert context_that_fits(plan, mixed, 1 << 24, 64) == context_that_fits(plan, TINY, 1 << 24, 64)
    baseline = layer * (2 * 1000 + 3 * 300)
    assert ratio(plan, mixed, 1000, 64) == pytest.approx(baseline / sequence_bytes(plan, TINY, 1000, 64))


@pytest.mark.parametrize("method", METHODS)
def test_layer_shares_add_up(method: str) -> None:
    plan = make_plan(TINY, method)
    total = sum(cost.bytes_per_token for cost in layer_costs(plan, TINY))
    whole = compressed_block_bytes(plan, TINY, 2) if plan.compresses else full_block_bytes(TINY, 2)
    assert total == pytest.approx(whole / BLOCK_SIZE)


@pytest.mark.parametrize("method", ["full", "kivi4"])
@pytest.mark.parametrize("context", [100, 4096, 5000, 20000])
def test_a_sequence_holds_what_its_sliding_window_shows(method: str, context: int) -> None:
    """Against the cache itself; the ratio is to the 16-bit keys and values that can still be seen."""
    config, window = replace(LLAMA2_7B, sliding_window=4096, max_position_embeddings=32768), 64
    plan = make_plan(config, method)
    pools = BlockPool(1000, "full"), BlockPool(1000, "compressed")
    cache = TieredCache(DemotionRule(window, 2048), *pools, plan.compresses, sliding_window=config.sliding_window)
    sequence = Sequence([0] * (context + 1), 1, context + 1)
    while sequence.num_computed < context:
        end = cache.chunk_end(sequence.num_computed, context, 1)
        cache.reserve(sequence, end)
        sequence.num_computed = end
        cache.release(cache.demote(sequence, cache.compressed_len(end, 1)))
    held = pools[0].num_used * full_block_bytes(config, 2) + pools[1].num_used * compressed_block_bytes(plan, config, 2)
    assert sequence_bytes(plan, config, context, window) == held
    seen = min(context, 4096) * baseline_bytes_per_token(config)
    assert ratio(plan, config, context, window) == pytest.approx(seen / held)


@pytest.mark.parametrize("method", ["full", "kivi4", "minicache4"])
@pytest.mark.parametrize("window", [1, 64, 100])
@pytest.mark.parametrize("sliding_window", [None, 300])
def test_context_that_fits(method: str, window: int, sliding_window: int | None) -> None:
    """The greatest whole number of blocks within every budget, or any length once the window's cache fits."""
    config = replace(TINY, sliding_window=sliding_window)
    plan = make_plan(config, method)
    most = max(sequence_bytes(plan, config, n, window) for n in range(290, 500))
    for memory in range(0, 12 * full_block_bytes(config, 2), 19_997):
        fits = context_that_fits(plan, config, memory, window)
        if fits is None:
            assert sliding_window is not None and most <= memory
            continue
        assert fits == 0 or sequence_bytes(plan, config, fits, window) <= memory
        if sliding_window is None:
            assert sequence_bytes(plan, config, fits + BLOCK_SIZE, window) > memory
        else:
            assert most > memory
