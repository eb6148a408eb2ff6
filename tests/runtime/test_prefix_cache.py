"""Which prefixes are found, what they are called, and what is shared; contents are the fake engine's business."""

import numpy as np
import pytest

from minicache_trt.runtime.block_pool import BlockPool, IntegrityError, OutOfBlocks
from minicache_trt.runtime.demotion import DemotionRule
from minicache_trt.runtime.prefix_cache import Hit
from minicache_trt.runtime.request import RequestOptions, Sequence
from minicache_trt.runtime.tiered_cache import TieredCache


def make_cache(full=40, compressed=40, window=64, quantum=256, compresses=True, reuse=True):
    pools = BlockPool(full, "full"), BlockPool(compressed, "compressed")
    return TieredCache(DemotionRule(window, quantum), *pools, compresses, reuse)


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, count).tolist()


def sequence(ids, prompt_len=None, salt=None, reuse=True, logits_start=None):
    return Sequence(list(ids), prompt_len or len(ids), 2000, logits_start, RequestOptions(cache_salt=salt, reuse=reuse))


def compute(cache, item):
    """Run a sequence to its last known token as the scheduler would; returns the blocks that had to be compressed."""
    demotions = []
    cache.prefixes.attach(item, cache.prefixes.match(item))
    while item.num_remaining:
        new = cache.demote(item, cache.compressed_len(item.num_computed, item.prompt_len))
        cache.release(new)
        demotions += new
        end = cache.chunk_end(item.num_computed, item.num_tokens, item.prompt_len)
        cache.reserve(item, end)
        cache.commit(item, end)
    return demotions


@pytest.fixture
def caches():
    """Makes caches; at the end all blocks must be accounted for."""
    made = []

    def make(**options):
        made.append(make_cache(**options))
        return made[-1]

    yield make
    for cache in made:
        cache.check_integrity([])
        assert cache.full_pool.num_used == cache.compressed_pool.num_used == 0


@pytest.mark.parametrize("compresses", [True, False])
@pytest.mark.parametrize(("common", "expected"), [(63, 0), (64, 64), (130, 128), (200, 192)])
def test_a_common_beginning_is_found_in_whole_blocks(caches, compresses, common, expected):
    cache = caches(compresses=compresses)
    first, second = sequence(tokens(200)), sequence(tokens(common) + [1001] * 100)
    compute(cache, first)
    table = list(first.full_table)
    cache.free(first)
    hit = cache.prefixes.match(second)
    assert hit == Hit(expected, 0, tuple(table[: expected // 64]), ())
    compute(cache, second)
    assert second.num_cached_tokens == expected
    assert second.full_table[: expected // 64] == table[: expected // 64] or second.compressed_len
    cache.free(second)
    assert cache.prefixes.hit_tokens == expected and cache.prefixes.lookup_tokens == 200 + common + 100


def test_the_last_token_and_wanted_logits_are_computed(caches):
    cache = caches()
    first = sequence(tokens(192))
    compute(cache, first)
    cache.free(first)
    assert cache.prefixes.match(sequence(tokens(192))).num_tokens == 128
    assert cache.prefixes.match(sequence(tokens(193))).num_tokens == 192
    assert cache.prefixes.match(sequence(tokens(193), logits_start=100)).num_tokens == 64


def test_salts_and_refusal_share_nothing(caches):
    cache = caches()
    first = sequence(tokens(200), salt="a")
    compute(cache, first)
    cache.free(first)
    for salt, expected in (("a", 192), ("b", 0), (None, 0)):
        assert cache.prefixes.match(sequence(tokens(200), salt=salt)).num_tokens == expected
    assert cache.prefixes.match(sequence(tokens(200), salt="a", reuse=False)) == Hit()
    silent = sequence(tokens(200, seed=1), reuse=False)
    compute(cache, silent)
    cache.free(silent)
    assert cache.prefixes.match(sequence(tokens(200, seed=1))) == Hit()


def test_a_hit_beyond_a_quantum_is_compressed_and_full(caches):
    """Prompts of 600 with quanta of 256: at 512 and later c is 448, at 256 to 511 it is 192, before that 0."""
    cache = caches()
    first = sequence(tokens(600))
    assert len(compute(cache, first)) == 448 // 64
    blocks = first.compressed_table[:]
    cache.free(first)
    second = sequence(tokens(600)[:590] + [1001] * 5)
    hit = cache.prefixes.match(second)
    assert (hit.num_tokens, hit.compressed_len, hit.compressed_blocks) == (576, 448, tuple(blocks))
    assert compute(cache, second) == [], "equal blocks are shared, not compressed again"
    assert second.compressed_table == blocks
    cache.free(second)


@pytest.mark.parametrize(
    ("lost_full", "lost_compressed", "expected"),
    [
        ([8], [], 512),  # [512, 576) is gone: 512 needs compressed [0, 448) and full [448, 512)
        ([7], [], 448),  # 512 and later need it; at 448 c is 192
        ([], [6], 448),  # c = 448 needs compressed block 6
        ([7], [2], 192),  # 192 is the longest with c = 0
        ([2, 7], [2], 128),
        ([0, 7], [2], 0),
        ([0], [], 576),
    ],
)
def test_a_hit_is_shortened_to_what_both_tiers_hold(caches, lost_full, lost_compressed, expected):
    cache = caches()
    first = sequence(tokens(600))
    compute(cache, first)
    names = cache.prefixes.hashes(first, 9)
    cache.free(first)
    cache.full_pool.forget([cache.full_pool.find(names[block]) for block in lost_full])
    cache.compressed_pool.forget([cache.compressed_pool.find(names[block]) for block in lost_compressed])
    second = sequence(tokens(600))
    hit = cache.prefixes.match(second)
    assert hit.num_tokens == expected
    assert hit.compressed_len == cache.compressed_len(expected, 600)
    assert [cache.compressed_pool.hash_of(b) for b in hit.compressed_blocks] == names[: hit.compressed_len // 64]
    assert [cache.full_pool.hash_of(b) for b in hit.full_blocks] == names[hit.compressed_len // 64 : expected // 64]
    compute(cache, second)
    cache.free(second)


def test_the_same_tokens_with_another_schedule_are_something_else(caches):
    """Generated tokens saw another c than the same tokens in a prompt: only what saw the same is found."""
    cache = caches()
    first = sequence(tokens(400), prompt_len=70)
    compute(cache, first)
    cache.free(first)
    # As a prompt, tokens 128 and later would have seen c = 0; the answer's saw c = 64 from position 128 on.
    assert cache.prefixes.match(sequence(tokens(400))).num_tokens == 128
    assert cache.prefixes.match(sequence(tokens(400), prompt_len=70)).num_tokens == 384
    assert cache.prefixes.match(sequence(tokens(400), prompt_len=75)).num_tokens == 384
    assert cache.prefixes.match(sequence(tokens(400), prompt_len=140)).num_tokens == 128


def test_running_sequences_share_blocks_and_the_last_owner_leaves_them_evictable(caches):
    cache = caches()
    first, second = sequence(tokens(200)), sequence(tokens(200))
    compute(cache, first)
    compute(cache, second)
    assert first.full_table[:3] == second.full_table[:3] and first.full_table[3] != second.full_table[3]
    cache.check_integrity([first, second])
    cache.free(first)
    cache.check_integrity([second])
    cache.free(second)
    assert cache.full_pool.num_evictable == 3


def test_least_recently_used_blocks_go_first_and_tails_before_heads(caches):
    cache = caches(full=10)
    for seed in (0, 1):
        item = sequence(tokens(256, seed))
        compute(cache, item)
        cache.free(item)
    again = sequence(tokens(200, 0))
    compute(cache, again)
    cache.free(again)
    assert cache.full_pool.num_evictions == 0
    other = sequence(tokens(190, 2))
    compute(cache, other)
    cache.free(other)
    assert cache.full_pool.num_evictions == 2
    assert [cache.prefixes.match(sequence(tokens(257, seed))).num_tokens for seed in (0, 1)] == [192, 192]


def test_failed_demotions_change_nothing_and_bad_blocks_are_forgotten(caches):
    cache = caches(compressed=4, quantum=64)
    first = sequence(tokens(200))
    compute(cache, first)
    second = sequence(tokens(128) + [1001] * 150)
    cache.prefixes.attach(second, cache.prefixes.match(second))
    before = list(second.full_table), list(second.compressed_table), second.compressed_len
    other = cache.compressed_pool.allocate(cache.compressed_pool.num_free)
    cache.reserve(second, 256)
    cache.commit(second, 256)
    with pytest.raises(OutOfBlocks):
        cache.demote(second, 192)
    assert (second.full_table[: len(before[0])], second.compressed_table, second.compressed_len) == before
    cache.compressed_pool.free(other)
    demotions = cache.demote(second, 192)
    cache.forget(demotions)
    cache.release(demotions)
    names = cache.prefixes.hashes(second, 3)
    assert [cache.compressed_pool.find(name) is None for name in names] == [False, False, True]
    cache.free(first)
    cache.free(second)


def test_check_integrity_knows_whose_block_it_is(caches):
    cache = caches()
    first, second = sequence(tokens(200)), sequence(tokens(200, 1))
    for item in (first, second):
        compute(cache, item)
    first.full_table[0], second.full_table[0] = second.full_table[0], first.full_table[0]
    with pytest.raises(IntegrityError, match=r"full tier: block \d+ has another prefix than its sequence's"):
        cache.check_integrity([first, second])
    first.full_table[0], second.full_table[0] = second.full_table[0], first.full_table[0]
    for item in (first, second):
        cache.free(item)
