"""Which tokens run in the next step."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.block_pool import OutOfBlocks
from minicache_trt.runtime.demotion import Demotion, used_blocks
from minicache_trt.runtime.prefix_cache import Hit
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.tiered_cache import TieredCache

PRIORITY_STEP = 64
"""A request overtakes at most this many earlier ones per unit of priority: urgent ones go first, none waits forever."""


class Work:
    """Positions [start, end) of one sequence, computed in one step.

    ``num_tokens`` is their number. ``num_logits`` rows of logits are wanted, those of the last positions; it is what
    the sequence wanted when this was made, before the step's tokens were known.
    """

    __slots__ = ("end", "num_logits", "num_tokens", "sequence", "start")

    def __init__(self, sequence: Sequence, start: int, end: int) -> None:
        self.sequence = sequence
        self.start = start
        self.end = end
        self.num_tokens = end - start
        self.num_logits = len(sequence.logit_positions(start, end))


@dataclass(frozen=True)
class ScheduledStep:
    """Work of one step: one-token items first, then longer chunks, each group in order of arrival."""

    work: tuple[Work, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.work)


class Scheduler:
    """Continuous batching: first come, first served within a priority, with chunked prefill and preemption.

    One step of its caller::

        demotions = demote()         compress them in the engine, then cache.release(demotions)
        step = schedule()            every running sequence now has the c of its next position
        logits = decode(step)        tokens = sample(logits)
        update(step, tokens)         then finish() what has ended; sequences may come and go at any time between steps

    ``running`` and ``waiting`` are each in order of rank, which a sequence gets when it is submitted and keeps: number
    of arrival plus `PRIORITY_STEP` times its priority. The first of those waiting is admitted as soon as there is a
    place; nobody who waits behind it is. When blocks run out the last of the running sequences gives up its blocks and
    waits again; it is recomputed with the same c at every position. The first one always advances, and everyone has a
    bounded number of others before it, so all of them end.

    Parameters
    ----------
    cache : TieredCache
        Large enough for one sequence of the greatest length submitted.
    max_batch_size : int
        Sequences in one step.
    max_num_tokens : int
        Tokens in one step, at least ``max_batch_size``.
    """

    def __init__(self, cache: TieredCache, max_batch_size: int, max_num_tokens: int) -> None:
        if not 1 <= max_batch_size <= max_num_tokens:
            expected = f"at least max_batch_size ({max_batch_size})"
            raise ValueError(f"max_num_tokens: expected {expected}, got {max_num_tokens}")
        self.cache = cache
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Submit a sequence; it must fit the cache on its own (the caller has refused longer ones)."""
        sequence.rank = self._num_submitted + PRIORITY_STEP * sequence.options.priority, self._num_submitted
        self._num_submitted += 1
        insort(self.waiting, sequence, key=_rank)

    def expired(self, now: float) -> list[Sequence]:
        """Sequences, running or waiting, whose deadline has come."""
        everyone = (*self.running, *self.waiting)
        return [s for s in everyone if s.options.deadline is not None and s.options.deadline <= now]

    def demote(self) -> list[Demotion]:
        """Bring c of every running sequence to what its next position needs; preempts when blocks run out."""
        demotions: list[Demotion] = []
        index = 0
        while index < len(self.running):  # who is preempted is the last, perhaps the one at hand
            sequence = self.running[index]
            try:
                new_c = self.cache.compressed_len(sequence.num_computed, sequence.prompt_len)
                demotions += self.cache.demote(sequence, new_c)
                index += 1
            except OutOfBlocks:
                self._preempt_last()
        return demotions

    def schedule(self) -> ScheduledStep:
        """Choose the next step's work and reserve its full-tier blocks; preempts when they run out."""
        work: list[Work] = []
        num_decodes = sum([sequence.num_remaining == 1 for sequence in self.running])
        budget = self.max_num_tokens - num_decodes
        preemptions = self.num_preemptions
        index = 0
        while index < len(self.running):  # who is preempted is the last, perhaps the one at hand
            sequence = self.running[index]
            is_decode = sequence.num_remaining == 1
            item = self._next_chunk(sequence, 1 if is_decode else budget)
            try:
                self.cache.reserve(sequence, item.end)
            except OutOfBlocks:
                self._preempt_last()
                continue
            if not is_decode:
                budget -= item.num_tokens
            work.append(item)
            index += 1
        if self.num_preemptions == preemptions:
            work += self._admit(budget)
        decodes = [item for item in work if item.num_tokens == 1]
        chunks = [item for item in work if item.num_tokens > 1]
        return ScheduledStep((*decodes, *chunks))

    def update(self, step: ScheduledStep, tokens: list[int | None]) -> None:
        """Record that ``step`` ran. ``tokens`` has one entry per work item: the sampled token, or None.

        A sequence all of whose tokens are computed must get a token, or be finished, before the next step.
        """
        for item, token in zip(step.work, tokens, strict=True):
            self.cache.commit(item.sequence, item.end)
            if token is not None:
                item.sequence.token_ids.append(token)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.cache.free(sequence)

    def check_integrity(self) -> None:
        """Between steps, see `TieredCache.check_integrity`."""
        self.cache.check_integrity((*self.running, *self.waiting))

    def _next_chunk(self, sequence: Sequence, budget: int) -> Work:
        start = sequence.num_computed
        if sequence.num_remaining == 1:
            return Work(sequence, start, start + min(1, budget))
        end = self.cache.chunk_end(start, sequence.num_tokens, sequence.prompt_len)
        return Work(sequence, start, min(end, start + budget))

    def _admit(self, budget: int) -> list[Work]:
        work: list[Work] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_size:
            hit = self.cache.prefixes.match(self.waiting[0])
            if not self._has_room(hit):
                break
            sequence = self.waiting.pop(0)
            insort(self.running, sequence, key=_rank)
            self.cache.prefixes.attach(sequence, hit)
            item = self._next_chunk(sequence, budget)
            self.cache.reserve(sequence, item.end)
            budget -= item.num_tokens
            work.append(item)
        return work

    def _has_room(self, hit: Hit) -> bool:
        """Whether the next waiting sequence fits beside what the running ones will hold one block of tokens from now.

        Without this check a second prompt would be admitted only to be preempted halfway. Blocks of the hit that
        others own are no new demand.
        """
        full_pool, compressed_pool = self.cache.full_pool, self.cache.compressed_pool
        full, compressed = self._peak(self.waiting[0], hit)
        full -= sum(full_pool.ref_counts[block] > 0 for block in hit.full_blocks)
        compressed -= sum(compressed_pool.ref_counts[block] > 0 for block in hit.compressed_blocks)
        for sequence in self.running:
            peak = self._peak(sequence)
            full += peak[0] - len(used_blocks(sequence.full_table))
            compressed += peak[1] - len(used_blocks(sequence.compressed_table))
        return (full <= full_pool.num_free and compressed <= compressed_pool.num_free) or not self.running

    def _peak(self, sequence: Sequence, hit: Hit | None = None) -> tuple[int, int]:
        end = min(sequence.num_tokens + BLOCK_SIZE, sequence.max_len)
        return self.cache.peak_blocks(sequence, end, hit)

    def _preempt_last(self) -> None:
        if len(self.running) == 1:
            raise RuntimeError("the cache is too small for one sequence; it should have been refused when submitted")
        sequence = self.running.pop()
        self.cache.free(sequence)
        insort(self.waiting, sequence, key=_rank)
        self.num_preemptions += 1


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
