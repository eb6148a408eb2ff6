import pytest
from fake_engine import expected_compressed_len
from hypothesis import given, settings
from hypothesis import strategies as st

from minicache_trt.config import BLOCK_SIZE, BuildConfig, KvCacheConfig
from minicache_trt.runtime.block_pool import BlockPool, IntegrityError, OutOfBlocks
from minicache_trt.runtime.cache_sizes import CacheSizes
from minicache_trt.runtime.demotion import DemotionRule
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.tiered_cache import TieredCache

windows = st.sampled_from([1, 63, 64, 65, 100, 128, 200])
quanta = st.sampled_from([64, 128, 192, 256])


def make_cache(full=20, compressed=20, window=64, quantum=128, compresses=True):
    pools = BlockPool(full, "full"), BlockPool(compressed, "compressed")
    return TieredCache(DemotionRule(window, quantum), *pools, compresses)


@given(windows, quanta, st.integers(0, 700), st.integers(0, 700))
def test_rule_against_the_obvious_formulation(window, quantum, position, prompt_len):
    rule = DemotionRule(window, quantum)
    c = rule.compressed_len(position, prompt_len)
    assert c == expected_compressed_len(position, prompt_len, window, quantum)
    assert c <= max(0, position - window)


@settings(max_examples=100, deadline=None)
@given(windows, quanta, st.integers(0, 700), st.integers(0, 700))
def test_chunk_end_is_the_largest(window, quantum, start, prompt_len):
    rule = DemotionRule(window, quantum)
    end = rule.chunk_end(start, prompt_len)
    assert end > start
    lengths = {expected_compressed_len(p, prompt_len, window, quantum) for p in range(start, end)}
    assert len(lengths) == 1
    changes = expected_compressed_len(end, prompt_len, window, quantum) not in lengths
    assert changes or end == prompt_len


def test_rule_validates():
    with pytest.raises(ValueError, match="window: expected a positive number, got 0"):
        DemotionRule(0, 128)
    with pytest.raises(ValueError, match="quantum: expected a positive multiple of 64, got 100"):
        DemotionRule(64, 100)


@settings(max_examples=60, deadline=None)
@given(st.data(), windows, quanta, st.booleans())
def test_every_position_has_one_place(data, window, quantum, compresses):
    """Tables against a dictionary from position to the (tier, block) it was last put in."""
    cache = make_cache(30, 30, window, quantum, compresses)
    sequences = [Sequence([0] * 700, data.draw(st.integers(1, 600)), 700) for _ in range(3)]
    places = [{} for _ in sequences]
    for _ in range(data.draw(st.integers(1, 25))):
        index = data.draw(st.integers(0, 2))
        sequence, place = sequences[index], places[index]
        if data.draw(st.integers(0, 9)) == 0:
            cache.free(sequence)
            place.clear()
        try:
            step(cache, sequence, place, data.draw(st.integers(1, 200)))
        except OutOfBlocks:
            cache.free(sequence)
            place.clear()
        cache.check_integrity(sequences)
        owners = [entry[:2] for entries in places for entry in set((t, b, o) for t, b, o in entries.values())]
        assert all(0 < block < 30 for _, block in owners)
    flat = [entry for entries in places for entry in entries.values()]
    assert len(flat) == len(set(flat)), "two positions share a place"
    for sequence in sequences:
        cache.free(sequence)
    cache.check_integrity([])
    assert cache.full_pool.num_used == cache.compressed_pool.num_used == 0


def step(cache, sequence, place, size):
    start = sequence.num_computed
    if start == sequence.num_tokens:
        return
    demotions = cache.demote(sequence, cache.compressed_len(start, sequence.prompt_len))
    for demotion in demotions:
        for offset in range(BLOCK_SIZE):
            position = demotion.block_index * BLOCK_SIZE + offset
            assert place[position] == ("full", demotion.source, offset)
            place[position] = ("compressed", demotion.target, offset)
        assert cache.full_pool.ref_counts[demotion.source] == 1, "a source was freed before it was compressed"
    cache.release(demotions)
    end = cache.chunk_end(start, min(start + size, sequence.num_tokens), sequence.prompt_len)
    peak = cache.peak_blocks(sequence, end)
    cache.reserve(sequence, end)
    assert peak == (len(sequence.full_table), len(sequence.compressed_table))
    for position, slot in zip(range(start, end), cache.slots(sequence, start, end).tolist(), strict=True):
        place[position] = ("full", slot // BLOCK_SIZE, slot % BLOCK_SIZE)
    sequence.num_computed = end
    for position, (tier, block, offset) in place.items():
        c = sequence.compressed_len
        table = sequence.compressed_table if position < c else sequence.full_table
        assert tier == ("compressed" if position < c else "full")
        assert table[(position if position < c else position - c) // BLOCK_SIZE] == block
        assert offset == position % BLOCK_SIZE


@settings(max_examples=60, deadline=None)
@given(windows, quanta, st.integers(1, 600), st.integers(0, 100), st.booleans())
def test_peak_blocks_is_what_a_replay_holds(window, quantum, prompt_len, generated, compresses):
    cache = make_cache(30, 30, window, quantum, compresses)
    sequence = Sequence([0] * (prompt_len + generated), prompt_len, prompt_len + generated)
    expected = cache.peak_blocks(sequence, sequence.num_tokens)
    full = 0
    while sequence.num_remaining:
        step(cache, sequence, {p: ("full", b, p % 64) for p, b in exact_places(sequence)}, 10**6)
        full = max(full, len(sequence.full_table))
    assert (full, len(sequence.compressed_table)) == expected


@settings(max_examples=150, deadline=None)
@given(st.data(), windows, quanta, st.booleans(), st.integers(1, 400), st.integers(1, 600), st.integers(0, 300))
def test_sliding_window(data, window, quantum, compresses, sliding, prompt_len, generated):
    """Exactly the blocks some query can still see are held, in slots that never change; the planned sizes suffice."""
    total = prompt_len + generated
    build = BuildConfig(1, total, total, window=window, quantum=quantum)
    sizes = CacheSizes.plan(build, KvCacheConfig(), compresses, 1000, 100, sliding_window=sliding)
    pools = BlockPool(sizes.full_blocks, "full"), BlockPool(sizes.compressed_blocks, "compressed")
    cache = TieredCache(DemotionRule(window, quantum), *pools, compresses, sliding_window=sliding)
    sequence = Sequence([0] * total, prompt_len, total)
    most = cache.peak_blocks(sequence, total)
    places = {}
    while sequence.num_remaining:
        start = sequence.num_computed
        first = max(0, start - sliding + 1) // BLOCK_SIZE
        demotions = cache.demote(sequence, cache.compressed_len(start, prompt_len))
        for demotion in demotions:
            assert demotion.block_index >= first and places.pop(demotion.block_index) == ("full", demotion.source)
            places[demotion.block_index] = ("compressed", demotion.target)
        cache.release(demotions)
        end = min(start + data.draw(st.integers(1, 300)), total)
        end = cache.chunk_end(start, end, prompt_len)
        peak = cache.peak_blocks(sequence, end)
        cache.reserve(sequence, end)
        c = sequence.compressed_len // BLOCK_SIZE
        table = sequence.compressed_table + sequence.full_table
        assert len(table) == -(-end // BLOCK_SIZE) and table[:first] == [0] * first and all(table[first:])
        assert c == expected_compressed_len(start, prompt_len, window, quantum) // BLOCK_SIZE * compresses
        for index, block in enumerate(table[first:], first):
            tier = "compressed" if index < c else "full"
            assert places.setdefault(index, (tier, block)) == (tier, block)
        held = cache.full_pool.num_used, cache.compressed_pool.num_used
        assert held == (len(table) - max(c, first), max(0, c - first))
        assert held[0] <= peak[0] <= most[0] < sizes.full_blocks
        assert held[1] <= peak[1] <= most[1] < sizes.compressed_blocks
        sequence.num_computed = end
        cache.check_integrity([sequence])
    cache.free(sequence)
    cache.check_integrity([])


def exact_places(sequence):
    for position in range(sequence.compressed_len, sequence.num_computed):
        yield position, sequence.full_table[(position - sequence.compressed_len) // BLOCK_SIZE]


def test_demote_moves_the_head_of_the_table():
    cache = make_cache()
    sequence = Sequence([0] * 300, 10, 300)
    cache.reserve(sequence, 300)
    sequence.num_computed = 300
    blocks = list(sequence.full_table)
    demotions = cache.demote(sequence, 128)
    assert [(d.source, d.block_index) for d in demotions] == [(blocks[0], 0), (blocks[1], 1)]
    assert sequence.compressed_table == [d.target for d in demotions]
    assert sequence.full_table == blocks[2:] and sequence.compressed_len == 128
    assert not set(cache.full_pool.allocate(14)) & set(blocks), "sources must not be reused before release"
    cache.release(demotions)
    assert cache.full_pool.num_free == 2
    assert cache.slots(sequence, 128, 130).tolist() == [blocks[2] * 64, blocks[2] * 64 + 1]
    assert cache.slots(sequence, 191, 193).tolist() == [blocks[2] * 64 + 63, blocks[3] * 64]
    assert cache.slots(sequence, 192, 193).tolist() == [blocks[3] * 64], "one position"


def test_failed_requests_change_nothing():
    cache = make_cache(full=4, compressed=2)
    sequence = Sequence([0] * 300, 10, 300)
    cache.reserve(sequence, 130)
    sequence.num_computed = 130
    before = (list(sequence.full_table), list(sequence.compressed_table), sequence.compressed_len)
    with pytest.raises(OutOfBlocks):
        cache.reserve(sequence, 300)
    with pytest.raises(OutOfBlocks):
        cache.demote(sequence, 128)
    assert before == (sequence.full_table, sequence.compressed_table, sequence.compressed_len)
    cache.check_integrity([sequence])


@pytest.mark.parametrize("new_c", [32, 192])
def test_only_complete_computed_blocks_are_demoted(new_c):
    cache = make_cache()
    sequence = Sequence([0] * 300, 10, 300)
    cache.reserve(sequence, 130)
    sequence.num_computed = 130
    with pytest.raises(IntegrityError, match=f"demotion to {new_c}: expected a multiple of 64"):
        cache.demote(sequence, new_c)


def test_check_integrity_reports_all_counts():
    cache = make_cache(full=6)
    sequence = Sequence([0] * 300, 10, 300)
    cache.reserve(sequence, 130)
    sequence.num_computed = 130
    cache.check_integrity([sequence])
    with pytest.raises(IntegrityError, match=r"full tier: 3 of 5 blocks used, references .*, table entries \{\}"):
        cache.check_integrity([])
    sequence.num_computed = 128
    with pytest.raises(IntegrityError, match=r"sequence: 128 tokens, 0 compressed, but tables of \(3, 0\) blocks"):
        cache.check_integrity([sequence])
    sequence.num_computed = 130
    sequence.full_table[0] = sequence.full_table[1]
    with pytest.raises(IntegrityError, match="3 of 5 blocks used"):
        cache.check_integrity([sequence])
