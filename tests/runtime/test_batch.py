import numpy as np
import pytest

from minicache_trt.contract import DECODER_INPUTS, PREFILL_TILE
from minicache_trt.runtime.batch import build_batch
from minicache_trt.runtime.block_pool import BlockPool
from minicache_trt.runtime.demotion import DemotionRule
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.scheduler import ScheduledStep, Work
from minicache_trt.runtime.tiered_cache import TieredCache


@pytest.fixture
def cache():
    return TieredCache(DemotionRule(64, 128), BlockPool(50, "full"), BlockPool(50, "compressed"), True)


def make_work(cache, tokens, start, end, c=0, logits_start=None):
    sequence = Sequence(tokens, len(tokens), 500, logits_start)
    cache.reserve(sequence, start)
    sequence.num_computed = start
    cache.release(cache.demote(sequence, c))
    cache.reserve(sequence, end)
    return Work(sequence, start, end)


def test_mixed_step(cache):
    decode = make_work(cache, list(range(200, 331)), 130, 131, c=64)
    unfinished = make_work(cache, list(range(10, 20)), 4, 7)
    finished = make_work(cache, list(range(40, 45)), 0, 5)
    batch = build_batch(ScheduledStep((decode, unfinished, finished)), cache)
    assert batch.input_ids.tolist() == [330, 14, 15, 16, 40, 41, 42, 43, 44]
    assert batch.positions.tolist() == [130, 4, 5, 6, 0, 1, 2, 3, 4]
    assert batch.query_start.tolist() == [0, 1, 4, 9]
    assert batch.context_len.tolist() == [131, 7, 5]
    assert batch.compressed_len.tolist() == [64, 0, 0]
    blocks = [item.sequence.full_table for item in (decode, unfinished, finished)]
    assert batch.full_table.tolist() == [blocks[0], [*blocks[1], 0], [*blocks[2], 0]]
    assert batch.compressed_table.tolist() == [decode.sequence.compressed_table, [0], [0]]
    expected = [blocks[0][1] * 64 + 2, *(blocks[1][0] * 64 + i for i in (4, 5, 6))]
    assert batch.slot_mapping.tolist() == expected + [blocks[2][0] * 64 + i for i in range(5)]
    assert batch.decode_rows.tolist() == [0]
    assert batch.prefill_rows.tolist() == [[1, 2, 3, 9, 9], [4, 5, 6, 7, 8]]
    assert batch.logit_index.tolist() == [0, 8], "the unfinished chunk needs no logits"
    assert all(getattr(batch, name).dtype == np.int32 for name in DECODER_INPUTS)
    assert all(getattr(batch, name).ndim == len(shape) for name, shape in DECODER_INPUTS.items())


def test_decodes_only(cache):
    batch = build_batch(ScheduledStep(tuple(make_work(cache, [1, 2, 3], 2, 3) for _ in range(3))), cache)
    assert batch.prefill_rows.shape == (0, 0)
    assert batch.decode_rows.tolist() == batch.logit_index.tolist() == [0, 1, 2]
    assert batch.compressed_table.shape == (3, 1)


def test_one_token_of_a_prompt_counts_as_a_decode(cache):
    batch = build_batch(ScheduledStep((make_work(cache, [1, 2, 3], 1, 2),)), cache)
    assert batch.decode_rows.tolist() == [0] and batch.prefill_rows.shape == (0, 0)
    assert batch.logit_index.shape == (0,)


@pytest.mark.parametrize(
    ("length", "width"),
    [(2, 2), (127, 127), (PREFILL_TILE, PREFILL_TILE), (129, 2 * PREFILL_TILE), (256, 256), (257, 3 * PREFILL_TILE)],
)
def test_width_of_prefill_rows(cache, length, width):
    batch = build_batch(ScheduledStep((make_work(cache, [1] * 300, 0, length),)), cache)
    assert batch.prefill_rows.shape == (1, width)
    assert batch.prefill_rows[0].tolist() == list(range(length)) + [length] * (width - length)


def test_all_rows_from_a_position_for_scoring(cache):
    work = make_work(cache, [1] * 9, 0, 3), make_work(cache, [1] * 9, 4, 8, logits_start=6)
    batch = build_batch(ScheduledStep(work), cache)
    assert batch.logit_index.tolist() == [5, 6]
    assert [item.num_logits for item in work] == [0, 2]
