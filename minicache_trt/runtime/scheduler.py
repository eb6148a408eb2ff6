"""Which tokens run in the next step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.block_pool import OutOfBlocks
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.tiered_cache import Demotion, TieredCache


@dataclass(frozen=True)
class Work:
    """Positions [start, end) of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_logits(self) -> int:
        """Rows of logits wanted, the last ones of the chunk."""
        return len(self.sequence.logit_positions(self.start, self.end))


@dataclass(frozen=True)
class ScheduledStep:
    """Work of one step: one-token items first, then longer chunks, each group in order of arrival."""

    work: tuple[Work, ...]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.work)


class Scheduler:
    """First come, first served, with chunked prefill and preemption of the youngest.

    One step of its caller::

        demotions = demote()         compress them in the engine, then cache.release(demotions)
        step = schedule()            every running sequence now has the c of its next position
        logits = decode(step)        tokens = sample(logits)
        update(step, tokens)         then finish() what has ended

    ``running`` and ``waiting`` are in order of arrival, and everything running arrived before everything waiting. When
    blocks run out the youngest running sequence gives up its blocks and becomes the first to wait; it is recomputed
    with the same c at every position. The oldest sequence always advances, so all of them end.

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
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Submit a sequence; it must fit the cache on its own (the caller has refused longer ones)."""
        self.waiting.append(sequence)

    def demote(self) -> list[Demotion]:
        """Bring c of every running sequence to what its next position needs; preempts when blocks run out."""
        demotions: list[Demotion] = []
        for sequence in tuple(self.running):
            while sequence in self.running:
                try:
                    new_c = self.cache.compressed_len(sequence.num_computed, sequence.prompt_len)
                    demotions += self.cache.demote(sequence, new_c)
                    break
                except OutOfBlocks:
                    self._preempt_youngest()
        return demotions

    def schedule(self) -> ScheduledStep:
        """Choose the next step's work and reserve its full-tier blocks; preempts when they run out."""
        work: list[Work] = []
        num_decodes = sum(sequence.num_remaining == 1 for sequence in self.running)
        budget = self.max_num_tokens - num_decodes
        preemptions = self.num_preemptions
        for sequence in tuple(self.running):
            while sequence in self.running:
                item = self._next_chunk(sequence, 1 if sequence.num_remaining == 1 else budget)
                try:
                    self.cache.reserve(sequence, item.end)
                except OutOfBlocks:
                    self._preempt_youngest()
                    continue
                if sequence.num_remaining > 1:
                    budget -= item.num_tokens
                work.append(item)
                break
        if self.num_preemptions == preemptions:
            work += self._admit(budget)
        work = [item for item in work if item.num_tokens]
        return ScheduledStep(tuple(sorted(work, key=lambda item: item.num_tokens > 1)))

    def update(self, step: ScheduledStep, tokens: list[int | None]) -> None:
        """Record that ``step`` ran. ``tokens`` has one entry per work item: the sampled token, or None.

        A sequence all of whose tokens are computed must get a token, or be finished, before the next step.
        """
        for item, token in zip(step.work, tokens, strict=True):
            item.sequence.num_computed = item.end
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
        end = self.cache.chunk_end(start, sequence.num_tokens, sequence.prompt_len)
        return Work(sequence, start, min(end, start + budget))

    def _admit(self, budget: int) -> list[Work]:
        work: list[Work] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_batch_size and self._has_room():
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            item = self._next_chunk(sequence, budget)
            self.cache.reserve(sequence, item.end)
            budget -= item.num_tokens
            work.append(item)
        return work

    def _has_room(self) -> bool:
        """Whether the next waiting sequence fits beside what the running ones will hold one block of tokens from now.

        Without this check a second prompt would be admitted only to be preempted halfway.
        """
        full = compressed = 0
        for sequence in (*self.running, self.waiting[0]):
            peak = self.cache.peak_blocks(sequence, min(sequence.num_tokens + BLOCK_SIZE, sequence.max_len))
            full += peak[0]
            compressed += peak[1]
        fits = full < self.cache.full_pool.num_blocks and compressed < self.cache.compressed_pool.num_blocks
        return fits or not self.running

    def _preempt_youngest(self) -> None:
        if len(self.running) == 1:
            raise RuntimeError("the cache is too small for one sequence; it should have been refused when submitted")
        sequence = self.running.pop()
        self.cache.free(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1
