"""The loop that joins engine, cache and scheduler."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from time import monotonic, perf_counter

import numpy as np

from minicache_trt.backends.base import Engine, cached_model
from minicache_trt.config import KvCacheConfig
from minicache_trt.contract import compressed_block_bytes, full_block_bytes
from minicache_trt.errors import UserError
from minicache_trt.runtime.batch import build_batch
from minicache_trt.runtime.block_pool import BlockPool, IntegrityError
from minicache_trt.runtime.cache_sizes import CacheSizes
from minicache_trt.runtime.demotion import Demotion, DemotionRule
from minicache_trt.runtime.job import Job, Update
from minicache_trt.runtime.request import Sequence
from minicache_trt.runtime.scheduler import ScheduledStep, Scheduler
from minicache_trt.runtime.statistics import Statistics
from minicache_trt.runtime.step_logits import StepLogits
from minicache_trt.runtime.tiered_cache import TieredCache


class Runner:
    """Runs jobs on an engine, step by step. One thread at a time may use it, the one that has claimed it.

    Parameters
    ----------
    engine : Engine
        Its pools are allocated here.
    cache_config : KvCacheConfig
        Memory for the cache.
    clock : callable
        Seconds; what deadlines are compared with.

    Attributes
    ----------
    statistics : Statistics
        Since the runner was claimed.
    before_engine : callable
        Called whenever the engine is about to compute, a good time to let other threads run.
    """

    def __init__(self, engine: Engine, cache_config: KvCacheConfig, clock: Callable[[], float] = monotonic) -> None:
        build, plan, cached = engine.build, engine.plan, cached_model(engine)
        self.engine = engine
        self.sizes = CacheSizes.plan(
            build,
            cache_config,
            plan.compresses,
            full_block_bytes(cached, engine.element_bytes),
            compressed_block_bytes(plan, cached, engine.element_bytes),
            engine.free_memory(),
            engine.model.cache_window,
        )
        allocated = engine.allocate(self.sizes.full_blocks, self.sizes.compressed_blocks)
        if allocated != self.sizes.num_bytes:
            raise IntegrityError(f"cache: planned {self.sizes.num_bytes} bytes, the engine allocated {allocated}")
        full_pool = BlockPool(self.sizes.full_blocks, "full")
        compressed_pool = BlockPool(self.sizes.compressed_blocks, "compressed")
        rule = DemotionRule(build.window, build.quantum)
        # A block behind a sliding window is gone, and with it the beginning of every prefix.
        window = engine.model.cache_window
        reuse = cache_config.enable_block_reuse and window is None
        self.cache = TieredCache(rule, full_pool, compressed_pool, plan.compresses, reuse, window)
        self.scheduler = Scheduler(self.cache, build.max_batch_size, build.max_num_tokens)
        self.statistics = self._new_statistics()
        self.before_engine: Callable[[], None] = lambda: None
        self._clock = clock
        self._claimed = threading.Lock()
        self._jobs: dict[Sequence, Job] = {}
        self._counts = self._count()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def claim(self) -> None:
        """Be the only user, with new statistics, until `release`.

        Raises
        ------
        UserError
            When there is another.
        """
        if not self._claimed.acquire(blocking=False):
            raise UserError("another generation is still running", "read its stream to the end, or close it, first")
        self.statistics = self._new_statistics()
        self._counts = self._count()

    def release(self) -> None:
        """Let others claim the runner."""
        self._claimed.release()

    def run(self, jobs: Iterable[Job]) -> Generator[list[Update], None, None]:
        """Claim the runner and run jobs to their end; yields what each step did.

        Closing the iterator early drops the jobs and frees their blocks.

        Raises
        ------
        UserError
            When somebody else has claimed the runner.
        """
        self.claim()
        try:
            for job in jobs:
                self.add(job)
            while self.has_work:
                yield self.step()
        finally:
            for job in tuple(self._jobs.values()):
                self.drop(job)
            try:
                self.check_integrity()
            finally:
                self.release()

    def add(self, job: Job) -> None:
        """Submit a job; it runs from the next step on."""
        self.statistics.prompt_tokens += job.sequence.prompt_len
        self._jobs[job.sequence] = job
        self.scheduler.add(job.sequence)

    def drop(self, job: Job) -> None:
        """Forget a job, finished or not, and free its blocks."""
        del self._jobs[job.sequence]
        self.scheduler.finish(job.sequence)

    def step(self) -> list[Update]:
        """End the jobs whose deadline has come or, when there are none, compute a batch; returns the jobs that changed.

        Raises
        ------
        Exception
            Whatever the engine or a job raises; no job has ended then. `fail_running` restores order.
        """
        expired = [self._jobs[sequence] for sequence in self.scheduler.expired(self._clock())]
        return [self._end(job, "timeout") for job in expired] if expired else self._run_batch()

    def fail_running(self, message: str) -> list[Update]:
        """After a step raised: end the jobs that were in its batch with an error; those that wait go on waiting."""
        failed = self.scheduler.running or self.scheduler.waiting
        return [self._end(self._jobs[sequence], "error", message) for sequence in tuple(failed)]

    def fail(self, job: Job, message: str) -> Update:
        """End a job with an error."""
        return self._end(job, "error", message)

    def cancel(self, job: Job) -> Update | None:
        """End a job at its caller's wish; None when it has ended before."""
        return self._end(job, "abort") if job.sequence in self._jobs else None

    def check_integrity(self) -> None:
        """Between steps: every block is accounted for; see `TieredCache.check_integrity`."""
        self.scheduler.check_integrity()

    def _end(self, job: Job, reason: str, message: str | None = None) -> Update:
        self.drop(job)
        job.end(reason, message)
        return Update.of(job)

    def _run_batch(self) -> list[Update]:
        started = perf_counter()
        self._compress(self.scheduler.demote())
        step = self.scheduler.schedule()
        self._measure_cache()
        batch = build_batch(step, self.cache)
        self.before_engine()
        logits = StepLogits(self.engine.decode(batch))
        jobs: list[Job] = []
        tokens: list[int | None] = []
        row, is_prefill = 0, False
        for item in step.work:
            sequence = item.sequence
            if item.start < sequence.prompt_len or item.num_tokens > 1:
                is_prefill = True
                sequence.first_step = sequence.first_step or started
            job = self._jobs[sequence]
            row += item.num_logits
            tokens.append(job.advance(item, logits, row))
            jobs.append(job)
        self.scheduler.update(step, tokens)
        updates = [Update.of(job) for job in jobs]
        for update in updates:
            if update.finished:
                self.drop(update.job)
        self.statistics.generated_tokens += len(tokens) - tokens.count(None)
        self._measure_time(step, is_prefill, perf_counter() - started)
        return updates

    def _compress(self, demotions: list[Demotion]) -> None:
        if not demotions:
            return
        columns = [(demotion.source, demotion.target, demotion.block_index) for demotion in demotions]
        sources, targets, indices = np.ascontiguousarray(np.array(columns, np.int32).T)
        self.before_engine()
        try:
            self.engine.compress(sources, targets, indices)
            for demotion in demotions:
                self._jobs[demotion.sequence].compressed(demotion)
        except BaseException:
            self.cache.forget(demotions)
            raise
        finally:
            self.cache.release(demotions)
        self.statistics.demotions += len(demotions)

    def _count(self) -> tuple[int, int, int, int]:
        prefixes = self.cache.prefixes
        evictions = self.cache.full_pool.num_evictions + self.cache.compressed_pool.num_evictions
        return self.scheduler.num_preemptions, prefixes.lookup_tokens, prefixes.hit_tokens, evictions

    def _measure_cache(self) -> None:
        statistics, sizes = self.statistics, self.sizes
        now = self._count()
        preemptions, lookups, hits, evictions = (
            after - before for after, before in zip(now, self._counts, strict=True)
        )
        self._counts = now
        statistics.preemptions += preemptions
        statistics.lookup_tokens += lookups
        statistics.hit_tokens += hits
        statistics.evictions += evictions
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
