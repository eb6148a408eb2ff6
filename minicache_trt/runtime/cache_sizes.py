"""How many blocks each tier gets out of a byte budget."""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.config import BLOCK_SIZE, BuildConfig, KvCacheConfig
from minicache_trt.errors import UserError
from minicache_trt.runtime.demotion import DemotionRule, blocks_for
from minicache_trt.units import format_bytes


@dataclass(frozen=True)
class CacheSizes:
    """Blocks of both tiers (block 0 of each included) and the bytes of one block.

    With a compressed tier, and every term capped by what ``max_seq_len`` tokens need::

        Nf = 1 + max_batch_size * (ceil(window / B) + 1) + active_prefills * quantum / B
        Nc = what is left of max_bytes

    Nf gives way when the rest could not hold the compressed part of one sequence. Without a compressed tier all
    bytes go to Nf, and Nc is block 0, which has no bytes. With a sliding window of w tokens, a sequence holds at most
    ceil((w - 1) / B) blocks of both tiers in front of the block, or quantum, it computes.
    """

    full_blocks: int
    compressed_blocks: int
    full_block_bytes: int
    compressed_block_bytes: int

    @property
    def full_bytes(self) -> int:
        return self.full_blocks * self.full_block_bytes

    @property
    def compressed_bytes(self) -> int:
        return self.compressed_blocks * self.compressed_block_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes allocated, exactly."""
        return self.full_bytes + self.compressed_bytes

    @classmethod
    def plan(
        cls,
        build: BuildConfig,
        cache: KvCacheConfig,
        compresses: bool,
        full_block_bytes: int,
        compressed_block_bytes: int,
        free_memory: int | None = None,
        sliding_window: int | None = None,
    ) -> CacheSizes:
        """Split ``cache.max_bytes``, or size both tiers for ``max_batch_size`` sequences of ``max_seq_len``.

        ``free_memory``: bytes free on a GPU, of which the cache may take its fraction; None elsewhere.

        Raises
        ------
        UserError
            When the budget is too small for one sequence of ``max_seq_len``.
        """
        longest = blocks_for(build.max_seq_len)
        if compresses:
            rule = DemotionRule(build.window, build.quantum)
            decode = min(blocks_for(build.window) + 1, longest)
            prefill = min(blocks_for(build.window) + 1 + build.quantum // BLOCK_SIZE, longest)
            compressed = rule.compressed_len(build.max_seq_len - 1, 0) // BLOCK_SIZE
        else:
            decode = prefill = longest
            compressed = 0
        if sliding_window is not None:
            seen = blocks_for(sliding_window - 1)
            decode, prefill = min(decode, seen + 1), min(prefill, seen + build.quantum // BLOCK_SIZE)
            compressed = min(compressed, blocks_for(max(0, sliding_window - 1 - build.window)))
        prefills = min(cache.active_prefills, build.max_batch_size)
        full_blocks = 1 + build.max_batch_size * decode + prefills * (prefill - decode)
        whole = cls(full_blocks, 1 + build.max_batch_size * compressed, full_block_bytes, compressed_block_bytes)
        budget = whole.num_bytes if cache.max_bytes is None else cache.max_bytes
        if free_memory is not None:
            budget = min(budget, int(cache.free_gpu_memory_fraction * free_memory))
        if cache.max_bytes is None and budget == whole.num_bytes:
            return whole

        needed = (1 + prefill) * full_block_bytes + (1 + compressed) * compressed_block_bytes
        if budget < needed:
            raise _too_small(build, cache, budget, needed)
        if not compresses:
            return cls(budget // full_block_bytes, 1, full_block_bytes, 0)
        room = (budget - (1 + compressed) * compressed_block_bytes) // full_block_bytes
        full_blocks = min(full_blocks, room)
        rest = budget - full_blocks * full_block_bytes
        return cls(full_blocks, rest // compressed_block_bytes, full_block_bytes, compressed_block_bytes)


def _too_small(build: BuildConfig, cache: KvCacheConfig, budget: int, needed: int) -> UserError:
    """The error for a budget that cannot hold one sequence."""
    given = budget == cache.max_bytes
    source = "max_bytes" if given else f"free_gpu_memory_fraction {cache.free_gpu_memory_fraction}"
    remedy = (
        f"raise max_bytes (--kv-cache-memory) to at least {needed}"
        if given
        else "raise the fraction (--kv-cache-free-gpu-memory-fraction), free the GPU's memory"
    )
    return UserError(
        f"{source}: {budget} bytes ({format_bytes(budget)}) of KV cache cannot hold one "
        f"sequence of max_seq_len {build.max_seq_len}, which needs {needed} bytes ({format_bytes(needed)})",
        f"{remedy}, or lower max_seq_len",
    )
