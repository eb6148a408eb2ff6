"""Cache sizes, counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicache_trt.compression.methods import METHODS, MethodOptions, make_plan
from minicache_trt.compression.size import (
    baseline_bytes_per_token,
    bytes_per_token,
    layer_costs,
    ratio,
    sequence_bytes,
)
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import compressed_block_bytes, compressed_pools, full_block_bytes, full_pools

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


@given(context=st.integers(1, 5000), window=st.integers(1, 300), method=st.sampled_from(list(METHODS)))
def test_sequence_bytes_count_whole_blocks(context: int, window: int, method: str) -> None:
    plan = make_plan(TINY, method)
    size = sequence_bytes(plan, TINY, context, window)
    compressed = 0 if not plan.compresses else max(0, context - window) // BLOCK_SIZE
    exact = -(-(context - compressed * BLOCK_SIZE) // BLOCK_SIZE)
    expected = compressed * compressed_block_bytes(plan, TINY, 2) + exact * full_block_bytes(TINY, 2)
    assert size == expected
    assert bytes_per_token(plan, TINY, context, window) * context == pytest.approx(size)


@pytest.mark.parametrize("method", METHODS)
def test_layer_shares_add_up(method: str) -> None:
    plan = make_plan(TINY, method)
    total = sum(cost.bytes_per_token for cost in layer_costs(plan, TINY))
    whole = compressed_block_bytes(plan, TINY, 2) if plan.compresses else full_block_bytes(TINY, 2)
    assert total == pytest.approx(whole / BLOCK_SIZE)
