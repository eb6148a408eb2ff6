"""Scheduler and cache without an engine: random workloads on pools down to the smallest legal size."""

import dataclasses

import numpy as np
import pytest
from fake_engine import expected_compressed_len, small_build
from hypothesis import event, given, settings
from hypothesis import strategies as st

from minicache_trt.config import KvCacheConfig
from minicache_trt.runtime.block_pool import BlockPool, OutOfBlocks
from minicache_trt.runtime.cache_sizes import CacheSizes
from minicache_trt.runtime.demotion import DemotionRule, blocks_for
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.scheduler import Scheduler
from minicache_trt.runtime.tiered_cache import TieredCache


def make_scheduler(build, full_blocks, compressed_blocks, compresses=True):
    pools = BlockPool(full_blocks, "full"), BlockPool(compressed_blocks, "compressed")
    cache = TieredCache(DemotionRule(build.window, build.quantum), *pools, compresses)
    return Scheduler(cache, build.max_batch_size, build.max_num_tokens)


def sizes_for(build, compresses, batch):
    config = dataclasses.replace(build, max_batch_size=batch)
    return CacheSizes.plan(config, KvCacheConfig(), compresses, 1000, 100 if compresses else 0)


def random_workload(seed):
    """Limits, a pool between the smallest legal one and plenty, and requests as (arrival, prompt_len, total)."""
    random = np.random.default_rng(seed)
    batch = int(random.integers(1, 6))
    build = small_build(
        max_batch_size=batch,
        max_num_tokens=int(random.integers(batch, 300)),
        window=int(random.choice([1, 64, 100, 128])),
        quantum=int(random.choice([64, 128, 256])),
        max_seq_len=int(random.choice([200, 384, 513])),
    )
    compresses = bool(random.integers(2))
    one, several = sizes_for(build, compresses, 1), sizes_for(build, compresses, batch)
    share = float(random.choice([0, 0, 0.2, 1]))
    full = one.full_blocks + int(share * (several.full_blocks - one.full_blocks))
    compressed = one.compressed_blocks + int(share * (several.compressed_blocks - one.compressed_blocks))
    requests = []
    for _ in range(random.integers(1, 9)):
        prompt = int(random.integers(1, random.choice([64, build.max_seq_len]) + 1))
        total = int(random.integers(prompt, build.max_seq_len + 1))
        requests.append((int(random.integers(0, 20)), prompt, total))
    return build, compresses, full, compressed, sorted(requests)


def check_step(scheduler, step, build, compresses):
    assert step.work, "an empty step makes no progress"
    assert len(step.work) <= build.max_batch_size and step.num_tokens <= build.max_num_tokens
    lengths = [item.num_tokens for item in step.work]
    assert min(lengths) >= 1
    assert sorted(lengths, key=lambda n: n > 1) == lengths, "decodes come first"
    assert any(item.sequence is scheduler.running[0] for item in step.work), "the oldest sequence must advance"
    assert {item.sequence for item in step.work} <= set(scheduler.running)
    for item in step.work:
        sequence = item.sequence
        assert item.start == sequence.num_computed and item.end <= sequence.num_tokens
        assert len(sequence.full_table) == blocks_for(item.end - sequence.compressed_len)
        for position in range(item.start, item.end):
            c = expected_compressed_len(position, sequence.prompt_len, build.window, build.quantum) if compresses else 0
            assert sequence.compressed_len == c == 64 * len(sequence.compressed_table)


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_sequence_ends_on_any_legal_pool(seed):
    build, compresses, full_blocks, compressed_blocks, requests = random_workload(seed)
    scheduler = make_scheduler(build, full_blocks, compressed_blocks, compresses)
    todo = [(arrival, Sequence([1] * prompt, prompt, total), total) for arrival, prompt, total in requests]
    arrivals = [sequence for _, sequence, _ in todo]
    totals = {sequence: total for _, sequence, total in todo}
    step_number = 0
    limit = sum(total for _, _, total in requests) + 20
    while todo or scheduler.has_work:
        while todo and (todo[0][0] <= step_number or not scheduler.has_work):
            scheduler.add(todo.pop(0)[1])
        demotions = scheduler.demote()
        assert all(scheduler.cache.full_pool.ref_counts[d.source] == 1 for d in demotions)
        scheduler.cache.release(demotions)
        step = scheduler.schedule()
        check_step(scheduler, step, build, compresses)
        order = [*scheduler.running, *scheduler.waiting]
        assert order == sorted(order, key=arrivals.index), "first come, first served"
        ended = [item.sequence for item in step.work if item.end == totals[item.sequence]]
        grows = [item.end == item.sequence.num_tokens and item.sequence not in ended for item in step.work]
        scheduler.update(step, [7 if grow else None for grow in grows])
        for sequence in ended:
            scheduler.finish(sequence)
        scheduler.check_integrity()
        step_number += 1
        # The oldest advances in every step and is never preempted, so there are no more steps than tokens.
        assert step_number <= limit
    assert scheduler.cache.full_pool.num_used == scheduler.cache.compressed_pool.num_used == 0
    event(f"preempted: {scheduler.num_preemptions > 0}")


def run_one_step(scheduler, token=None):
    scheduler.cache.release(scheduler.demote())
    step = scheduler.schedule()
    grows = [item.end == item.sequence.num_tokens for item in step.work]
    scheduler.update(step, [5 if grow else token for grow in grows])
    return [(item.start, item.end) for item in step.work]


def test_decodes_go_first_and_prefill_fills_the_budget():
    build = small_build(max_num_tokens=100, max_batch_size=3)
    scheduler = make_scheduler(build, 30, 30)
    first, second = Sequence([1] * 10, 10, 200), Sequence([1] * 150, 150, 300)
    scheduler.add(first)
    assert run_one_step(scheduler) == [(0, 10)]
    scheduler.add(second)
    assert run_one_step(scheduler) == [(10, 11), (0, 99)]
    assert run_one_step(scheduler) == [(11, 12), (99, 128)], "the quantum ends at 128"
    assert run_one_step(scheduler) == [(12, 13), (128, 150)]
    assert run_one_step(scheduler) == [(13, 14), (150, 151)]


def test_the_youngest_is_preempted_and_replays_its_schedule():
    build = small_build(max_batch_size=2, max_num_tokens=512, max_seq_len=384)
    scheduler = make_scheduler(build, 7, 5, compresses=False)
    old, young = Sequence([1] * 100, 100, 384), Sequence([1] * 100, 100, 384)
    for sequence in (old, young):
        scheduler.add(sequence)
    while not scheduler.num_preemptions:
        run_one_step(scheduler)
    assert list(scheduler.running) == [old] and list(scheduler.waiting) == [young]
    assert (young.num_computed, young.full_table, young.compressed_len) == (0, [], 0)
    assert young.num_tokens > young.prompt_len, "its tokens stay"
    scheduler.finish(old)
    tokens = young.num_tokens
    assert run_one_step(scheduler) == [(0, tokens)]
    scheduler.finish(young)
    scheduler.check_integrity()


def test_replay_of_generated_tokens_is_cut_where_c_changes():
    scheduler = make_scheduler(small_build(max_num_tokens=512), 30, 30)
    sequence = Sequence([1] * 330, 150, 400)
    scheduler.add(sequence)
    chunks = [run_one_step(scheduler)[0] for _ in range(6)]
    assert chunks == [(0, 128), (128, 150), (150, 192), (192, 256), (256, 320), (320, 330)]


def test_a_prompt_that_would_not_fit_waits():
    """Two prompts of a quantum share a pool for one: the second starts when the first has been demoted."""
    build = small_build(max_batch_size=2, max_num_tokens=256, quantum=256)
    sizes = CacheSizes.plan(build, KvCacheConfig(), True, 1000, 100)
    scheduler = make_scheduler(build, sizes.full_blocks, sizes.compressed_blocks)
    first, second = Sequence([1] * 256, 256, 300), Sequence([1] * 256, 256, 300)
    scheduler.add(first)
    scheduler.add(second)
    assert run_one_step(scheduler) == [(0, 256)]
    assert run_one_step(scheduler) == [(256, 257), (0, 255)]
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize(("full_blocks", "error"), [(2, OutOfBlocks), (3, RuntimeError)])
def test_a_sequence_too_long_for_the_pool_is_an_error_not_a_loop(full_blocks, error):
    scheduler = make_scheduler(small_build(), full_blocks, 3)
    scheduler.add(Sequence([1] * 200, 200, 300))
    with pytest.raises(error, match=r"1 free|too small for one sequence"):
        for _ in range(2):
            run_one_step(scheduler)


def test_limits_are_checked():
    with pytest.raises(ValueError, match=r"max_num_tokens: expected at least max_batch_size \(4\), got 3"):
        Scheduler(make_scheduler(small_build(), 10, 10).cache, 4, 3)
