"""One step's inputs, in the order and with the names of the contract."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import PREFILL_TILE
from minicache_trt.runtime.scheduler import ScheduledStep, Work
from minicache_trt.runtime.tiered_cache import TieredCache

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """int32 arrays of `minicache_trt.contract.DECODER_INPUTS`; see there for shapes and meaning.

    Invariants: the first ``len(decode_rows)`` sequences have one token each; every table has at least one column; table
    entries that are unused, or behind a sliding window, are 0; ``prefill_rows`` has T in its padding and a width of at
    most `PREFILL_TILE` or a multiple of it.
    """

    input_ids: Int32
    positions: Int32
    query_start: Int32
    context_len: Int32
    compressed_len: Int32
    slot_mapping: Int32
    full_table: Int32
    compressed_table: Int32
    full_work: Int32
    compressed_work: Int32
    decode_rows: Int32
    prefill_rows: Int32
    prefill_past: Int32
    logit_index: Int32

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def build_batch(step: ScheduledStep, cache: TieredCache) -> Batch:
    """Pack a step with reserved blocks into the decoder's inputs.

    Parameters
    ----------
    step : ScheduledStep
        At least one item; one-token items first.
    cache : TieredCache
        Owner of the sequences' tables.

    Returns
    -------
    Batch
        ``logit_index`` lists, item after item, the last `Work.num_logits` rows of each.
    """
    work = step.work
    sequences = [item.sequence for item in work]
    ends = list(accumulate([item.num_tokens for item in work]))
    query_start = np.array([0, *ends], np.int32)
    decodes = [item for item in work if item.num_tokens == 1]
    num_decodes = len(decodes)
    compressed_len = np.array([sequence.compressed_len for sequence in sequences], np.int32)
    full_table = _table([sequence.full_table for sequence in sequences])
    compressed_table = _table([sequence.compressed_table for sequence in sequences])
    token_ids = [item.sequence.token_ids[item.start] for item in decodes]
    positions = [item.start for item in decodes]
    offsets = np.array(positions, np.int32) - compressed_len[:num_decodes]
    blocks = full_table[np.arange(num_decodes), offsets // BLOCK_SIZE]
    slots = [blocks * BLOCK_SIZE + offsets % BLOCK_SIZE]
    for item in work[num_decodes:]:
        token_ids += item.sequence.token_ids[item.start : item.end]
        positions += range(item.start, item.end)
        slots.append(cache.slots(item.sequence, item.start, item.end))
    logit_rows = [row for item, end in zip(work, ends, strict=True) for row in range(end - item.num_logits, end)]
    return Batch(
        input_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_start=query_start,
        context_len=np.array([item.end for item in work], np.int32),
        compressed_len=compressed_len,
        slot_mapping=np.concatenate(slots),
        full_table=full_table,
        compressed_table=compressed_table,
        full_work=work_list(full_table[:num_decodes]),
        compressed_work=work_list(compressed_table[:num_decodes]),
        decode_rows=np.arange(num_decodes, dtype=np.int32),
        prefill_rows=_prefill_rows(work[num_decodes:], query_start[num_decodes:]),
        prefill_past=prefill_past([item.start - item.sequence.compressed_len for item in work[num_decodes:]]),
        logit_index=np.array(logit_rows, np.int32),
    )


def work_list(table: Int32) -> Int32:
    """Places s * width + m of the blocks in use in a table ``[S, width]``: entries that are not 0."""
    return np.flatnonzero(table).astype(np.int32)


def prefill_past(lengths: list[int]) -> Int32:
    """The tensor that is as long as the longest of the chunks' uncompressed histories."""
    return np.zeros(max(lengths, default=0), np.int32)


def _table(rows: list[list[int]]) -> Int32:
    columns = list(zip_longest(*rows, fillvalue=0)) or [(0,) * len(rows)]
    return np.ascontiguousarray(np.array(columns, np.int32).T)


def _prefill_rows(chunks: tuple[Work, ...], query_start: Int32) -> Int32:
    width = max((chunk.num_tokens for chunk in chunks), default=0)
    if width > PREFILL_TILE:
        width = -(-width // PREFILL_TILE) * PREFILL_TILE
    rows = np.full((len(chunks), width), query_start[-1], np.int32)
    for index, (start, end) in enumerate(pairwise(query_start.tolist())):
        rows[index, : end - start] = np.arange(start, end)
    return rows
