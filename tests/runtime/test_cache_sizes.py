import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicache_trt.config import BuildConfig, KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.cache_sizes import CacheSizes

FULL, COMPRESSED = 1000, 300


def build(**changes):
    values = {"max_batch_size": 4, "max_seq_len": 4096, "max_num_tokens": 128, "window": 64, "quantum": 1024}
    return BuildConfig(**{**values, **changes})


def test_formula():
    sizes = CacheSizes.plan(build(), KvCacheConfig(max_bytes=10**6, active_prefills=2), True, FULL, COMPRESSED)
    assert sizes.full_blocks == 1 + 4 * (1 + 1) + 2 * 1024 // 64
    assert sizes.compressed_blocks == (10**6 - sizes.full_blocks * FULL) // COMPRESSED
    assert sizes.num_bytes == sizes.full_blocks * FULL + sizes.compressed_blocks * COMPRESSED <= 10**6


def test_default_fits_every_sequence():
    sizes = CacheSizes.plan(build(), KvCacheConfig(), True, FULL, COMPRESSED)
    assert sizes.full_blocks == 1 + 4 * 2 + 16
    # Position 4095, the last one, leaves 64 tokens and a partial block exact: 62 whole blocks are demoted.
    assert sizes.compressed_blocks == 1 + 4 * 62


def test_without_compression_everything_is_full():
    sizes = CacheSizes.plan(build(), KvCacheConfig(), False, FULL, 0)
    assert (sizes.full_blocks, sizes.num_bytes) == (1 + 4 * 64, (1 + 4 * 64) * FULL)
    sizes = CacheSizes.plan(build(), KvCacheConfig(max_bytes=70_500), False, FULL, 0)
    assert (sizes.full_blocks, sizes.compressed_bytes) == (70, 0)


def test_short_sequences_need_no_whole_quantum():
    sizes = CacheSizes.plan(build(max_seq_len=128), KvCacheConfig(active_prefills=3), True, FULL, COMPRESSED)
    assert (sizes.full_blocks, sizes.compressed_blocks) == (1 + 4 * 2, 1)
    sizes = CacheSizes.plan(build(max_seq_len=320), KvCacheConfig(active_prefills=9), True, FULL, COMPRESSED)
    assert sizes.full_blocks == 1 + 4 * 5


@pytest.mark.parametrize("compresses", [True, False])
def test_too_small_a_budget_says_what_is_needed(compresses):
    compressed = COMPRESSED if compresses else 0
    needed = (1 + 18) * FULL + (1 + 62) * COMPRESSED if compresses else 65 * FULL
    with pytest.raises(UserError) as error:
        CacheSizes.plan(build(), KvCacheConfig(max_bytes=needed - 1), compresses, FULL, compressed)
    assert f"{needed - 1} bytes" in error.value.cause and f"needs {needed} bytes" in error.value.cause
    assert "max_seq_len 4096" in error.value.cause
    assert "--kv-cache-memory" in error.value.remedy and "lower max_seq_len" in error.value.remedy
    sizes = CacheSizes.plan(build(), KvCacheConfig(max_bytes=needed), compresses, FULL, compressed)
    assert sizes.num_bytes == needed


@given(st.integers(1, 8), st.integers(1, 5000), st.integers(1, 300), st.integers(1, 20), st.integers(1, 10**6))
def test_a_budget_is_never_exceeded(batch, max_seq_len, window, quantum, budget):
    config = build(max_batch_size=batch, max_seq_len=max_seq_len, window=window, quantum=64 * quantum)
    try:
        sizes = CacheSizes.plan(config, KvCacheConfig(max_bytes=budget), True, FULL, COMPRESSED)
    except UserError:
        return
    assert budget - COMPRESSED < sizes.num_bytes <= budget
    assert sizes.compressed_blocks >= 1 and sizes.full_blocks >= 2


@pytest.mark.parametrize("compresses", [True, False])
def test_a_gpu_gives_its_share_of_what_is_free(compresses):
    compressed = COMPRESSED if compresses else 0

    def plan(free, config=None):
        return CacheSizes.plan(build(), config or KvCacheConfig(), compresses, FULL, compressed, free)

    whole = plan(None)
    assert plan(10**9) == whole
    sizes = plan(90_000)
    assert sizes.num_bytes <= 81_000 < sizes.num_bytes + FULL and sizes != whole
    half = KvCacheConfig(free_gpu_memory_fraction=0.5)
    assert plan(180_000, half).num_bytes <= 90_000
    both = KvCacheConfig(max_bytes=84_000)
    assert plan(10**9, both) == CacheSizes.plan(build(), both, compresses, FULL, compressed)
    assert plan(90_000, both) == sizes
    with pytest.raises(UserError, match=r"free_gpu_memory_fraction 0\.9: 9 bytes") as error:
        plan(10)
    assert "--kv-cache-free-gpu-memory-fraction" in error.value.remedy


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_a_share_is_between_nothing_and_all(fraction):
    with pytest.raises(ValueError, match="free_gpu_memory_fraction: expected a number between 0 and 1"):
        KvCacheConfig(free_gpu_memory_fraction=fraction)
