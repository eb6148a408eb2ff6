"""The loop that joins engine, cache and scheduler."""

from __future__ import annotations

from collections.abc import Callable, Generator
from time import perf_counter
from typing import Protocol, TypeVar

import numpy as np

from minicache_trt.backends.base import Engine
from minicache_trt.config import KvCacheConfig
from minicache_trt.contract import compressed_block_bytes, full_block_bytes
from minicache_trt.errors import UserError
from minicache_trt.runtime.batch import build_batch
from minicache_trt.runtime.block_pool import BlockPool, IntegrityError
from minicache_trt.runtime.cache_sizes import CacheSizes
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.sampler import Logits
from minicache_trt.runtime.scheduler import ScheduledStep, Scheduler, Work
from minicache_trt.runtime.statistics import Statistics
from minicache_trt.runtime.tiered_cache import Demotion, DemotionRule, TieredCache


class Job(Protocol):
    """What a sequence does with its logits."""

    @property
    def sequence(self) -> Sequence: ...

    @property
    def finished(self) -> bool: ...

    def advance(self, item: Work, logits: Logits) -> int | None:
        """Take the logits ``[item.num_logits, vocab]`` of an item that ran; return the sequence's next token.

        Must return a token, or be finished, when the item reached the sequence's last known token. The array is only
        valid during the call.
        """
        ...


AnyJob = TypeVar("AnyJob", bound=Job)


class Runner:
    """Runs jobs on an engine until all are finished.

    Parameters
    ----------
    engine : Engine
        Its pools are allocated here.
    cache_config : KvCacheConfig
        Memory for the cache.

    Attributes
    ----------
    statistics : Statistics
        Of the latest run.
    """

    def __init__(self, engine: Engine, cache_config: KvCacheConfig) -> None:
        build, plan = engine.build, engine.plan
        self.engine = engine
        self.sizes = CacheSizes.plan(
            build,
            cache_config,
            plan.compresses,
            full_block_bytes(engine.model, engine.element_bytes),
            compressed_block_bytes(plan, engine.model, engine.element_bytes),
            engine.free_memory(),
            engine.model.sliding_window,
        )
        allocated = engine.allocate(self.sizes.full_blocks, self.sizes.compressed_blocks)
        if allocated != self.sizes.num_bytes:
            raise IntegrityError(f"cache: planned {self.sizes.num_bytes} bytes, the engine allocated {allocated}")
        full_pool = BlockPool(self.sizes.full_blocks, "full")
        compressed_pool = BlockPool(self.sizes.compressed_blocks, "compressed")
        rule = DemotionRule(build.window, build.quantum)
        self.cache = TieredCache(rule, full_pool, compressed_pool, plan.compresses, engine.model.sliding_window)
        self.scheduler = Scheduler(self.cache, build.max_batch_size, build.max_num_tokens)
        self.statistics = self._new_statistics()

    def run(
        self, jobs: list[AnyJob], observe: Callable[[Demotion], None] | None = None
    ) -> Generator[list[AnyJob], None, None]:
        """Run jobs to their end; after each step, yields those that computed something in it.

        ``observe`` is called with each block that was compressed, while source and target are as the engine left them.

        Closing the iterator early drops the jobs and frees their blocks.

        Raises
        ------
        UserError
            When an earlier iterator is still open.
        """
        if self.scheduler.has_work:
            raise UserError("another generation is still running", "read its stream to the end, or close it, first")
        self.statistics = self._new_statistics()
        owners = {job.sequence: job for job in jobs}
        for job in jobs:
            self.statistics.prompt_tokens += job.sequence.prompt_len
            self.scheduler.add(job.sequence)
        try:
            while self.scheduler.has_work:
                yield self._step(owners, observe)
        finally:
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):
                self.scheduler.finish(sequence)
            self.check_integrity()

    def check_integrity(self) -> None:
        """When idle, every block is free; see `TieredCache.check_integrity`."""
        self.scheduler.check_integrity()

    def _step(self, owners: dict[Sequence, AnyJob], observe: Callable[[Demotion], None] | None) -> list[AnyJob]:
        started = perf_counter()
        preemptions = self.scheduler.num_preemptions
        self._compress(self.scheduler.demote(), observe)
        step = self.scheduler.schedule()
        self._measure_cache()
        logits = self.engine.decode(build_batch(step, self.cache))
        jobs = [owners[item.sequence] for item in step.work]
        tokens: list[int | None] = []
        row = 0
        for item, job in zip(step.work, jobs, strict=True):
            tokens.append(job.advance(item, logits[row : row + item.num_logits]))
            row += item.num_logits
        is_prefill = any(item.num_tokens > 1 or item.start < item.sequence.prompt_len for item in step.work)
        self.scheduler.update(step, tokens)
        for job in jobs:
            if job.finished:
                self.scheduler.finish(job.sequence)
        self.statistics.generated_tokens += sum(token is not None for token in tokens)
        self.statistics.preemptions += self.scheduler.num_preemptions - preemptions
        self._measure_time(step, is_prefill, perf_counter() - started)
        return jobs

    def _compress(self, demotions: list[Demotion], observe: Callable[[Demotion], None] | None) -> None:
        if not demotions:
            return
        columns = [(demotion.source, demotion.target, demotion.block_index) for demotion in demotions]
        sources, targets, indices = np.ascontiguousarray(np.array(columns, np.int32).T)
        try:
            self.engine.compress(sources, targets, indices)
            if observe is not None:
                for demotion in demotions:
                    observe(demotion)
        finally:
            self.cache.release(demotions)
        self.statistics.demotions += len(demotions)

    def _measure_cache(self) -> None:
        statistics, sizes = self.statistics, self.sizes
        full = self.cache.full_pool.num_used * sizes.full_block_bytes
        compressed = self.cache.compressed_pool.num_used * sizes.compressed_block_bytes
        statistics.full_bytes_used = max(statistics.full_bytes_used, full)
        statistics.compressed_bytes_used = max(statistics.compressed_bytes_used, compressed)

    def _measure_time(self, step: ScheduledStep, is_prefill: bool, seconds: float) -> None:
        if is_prefill:
            self.statistics.prefill_steps += 1
            self.statistics.prefill_tokens += step.num_tokens
            self.statistics.prefill_seconds += seconds
        else:
            self.statistics.decode_steps += 1
            self.statistics.decode_tokens += step.num_tokens
            self.statistics.decode_seconds += seconds

    def _new_statistics(self) -> Statistics:
        return Statistics(self.sizes.full_bytes, self.sizes.compressed_bytes)
