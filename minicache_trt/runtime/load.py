"""What a running engine has to do at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from minicache_trt.runtime.block_pool import BlockPool

if TYPE_CHECKING:
    from minicache_trt.runtime.runner import Runner


@dataclass(frozen=True)
class TierUsage:
    """Blocks of one tier: ``used`` by requests, ``reusable`` (cached, given up when needed), ``total``."""

    used: int
    reusable: int
    total: int

    @classmethod
    def of(cls, pool: BlockPool) -> TierUsage:
        return cls(pool.num_used, pool.num_evictable, pool.num_blocks - 1)


@dataclass(frozen=True)
class Load:
    """Requests that run and wait, and both tiers. Numbers read during a step may be one step apart."""

    running: int
    waiting: int
    full: TierUsage
    compressed: TierUsage

    @classmethod
    def of(cls, runner: Runner) -> Load:
        scheduler, cache = runner.scheduler, runner.cache
        tiers = TierUsage.of(cache.full_pool), TierUsage.of(cache.compressed_pool)
        return cls(len(scheduler.running), len(scheduler.waiting), *tiers)
