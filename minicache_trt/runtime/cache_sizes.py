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
    bytes go to Nf, and Nc is block 0, which has no bytes.
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
    ) -> CacheSizes:
        """Split ``cache.max_bytes``, or size both tiers for ``max_batch_size`` sequences of ``max_seq_len``.

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
        prefills = min(cache.active_prefills, build.max_batch_size)
        full_blocks = 1 + build.max_batch_size * decode + prefills * (prefill - decode)
        if cache.max_bytes is None:
            blocks = full_blocks, 1 + build.max_batch_size * compressed
            return cls(*blocks, full_block_bytes, compressed_block_bytes)

        needed = (1 + prefill) * full_block_bytes + (1 + compressed) * compressed_block_bytes
        if cache.max_bytes < needed:
            raise UserError(
                f"max_bytes: {cache.max_bytes} bytes ({format_bytes(cache.max_bytes)}) of KV cache cannot hold one "
                f"sequence of max_seq_len {build.max_seq_len}, which needs {needed} bytes ({format_bytes(needed)})",
                f"raise max_bytes (--kv-cache-memory) to at least {needed}, or lower max_seq_len",
            )
        if not compresses:
            return cls(cache.max_bytes // full_block_bytes, 1, full_block_bytes, 0)
        room = (cache.max_bytes - (1 + compressed) * compressed_block_bytes) // full_block_bytes
        full_blocks = min(full_blocks, room)
        rest = cache.max_bytes - full_blocks * full_block_bytes
        return cls(full_blocks, rest // compressed_block_bytes, full_block_bytes, compressed_block_bytes)
