"""The two tiers of a sequence: which position is where, and when blocks move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.block_pool import BlockPool, IntegrityError, OutOfBlocks
from minicache_trt.runtime.demotion import Demotion, DemotionRule, blocks_behind, blocks_for, used_blocks
from minicache_trt.runtime.prefix_cache import Hit, PrefixCache
from minicache_trt.runtime.request import Sequence


class TieredCache:
    """Block tables of all sequences over two pools.

    For a sequence with n computed tokens and c of them compressed::

        positions [0, c)   compressed_table[0 : c/B]           grows in `demote` only
        positions [c, n)   full_table[0 : ceil((n - c)/B)]     grows in `reserve`, shrinks in `demote`

    Complete blocks may be in the tables of several sequences; nobody writes to them any more.

    With a sliding window, blocks no query from n on can see are freed in `demote`: their entries, the first ones of the
    tables, are 0. One that is behind the window when its turn comes is not compressed.

    Parameters
    ----------
    rule : DemotionRule
        When blocks are demoted.
    full_pool, compressed_pool : BlockPool
        The tiers' ids.
    compresses : bool
        Whether the plan has a compressed tier; without one c is always 0.
    reuse : bool
        Whether sequences share blocks with equal contents, see `PrefixCache`; not together with a sliding window.
    sliding_window : int, optional
        Tokens a query sees, itself included; default all.
    """

    def __init__(
        self,
        rule: DemotionRule,
        full_pool: BlockPool,
        compressed_pool: BlockPool,
        compresses: bool,
        reuse: bool = False,
        sliding_window: int | None = None,
    ) -> None:
        self.sliding_window = sliding_window
        self.rule = rule
        self.full_pool = full_pool
        self.compressed_pool = compressed_pool
        self.compresses = compresses
        self.prefixes = PrefixCache(rule if compresses else None, full_pool, compressed_pool, reuse)

    def compressed_len(self, position: int, prompt_len: int) -> int:
        """c of the query at ``position`` under this cache's plan."""
        return self.rule.compressed_len(position, prompt_len) if self.compresses else 0

    def chunk_end(self, start: int, end: int, prompt_len: int) -> int:
        """Largest end of a chunk from ``start``, at most ``end``, whose queries share one c.

        With a sliding window, chunks also end with the quantum, where blocks behind the window can be freed.
        """
        if self.sliding_window is not None:
            end = min(end, (start // self.rule.quantum + 1) * self.rule.quantum)
        return min(end, self.rule.chunk_end(start, prompt_len)) if self.compresses else end

    def peak_blocks(self, sequence: Sequence, end: int, hit: Hit | None = None) -> tuple[int, int]:
        """Most (full, compressed) blocks the sequence holds while it computes up to position ``end``.

        With ``hit``, as if it started there.
        """
        if hit is None:
            start = sequence.num_computed
            full, compressed = (len(used_blocks(table)) for table in (sequence.full_table, sequence.compressed_table))
        else:
            start, full, compressed = hit.num_tokens, len(hit.full_blocks), hit.compressed_len // BLOCK_SIZE
        while start < end:
            c = self.compressed_len(start, sequence.prompt_len) // BLOCK_SIZE
            behind = blocks_behind(start, self.sliding_window)
            start = self.chunk_end(start, end, sequence.prompt_len)
            full = max(full, blocks_for(start) - max(c, behind))
            compressed = max(compressed, c - behind)
        return full, compressed

    def reserve(self, sequence: Sequence, end: int) -> None:
        """Own full-tier blocks for all of [c, end).

        Raises
        ------
        OutOfBlocks
            Nothing has changed then.
        """
        missing = blocks_for(end - sequence.compressed_len) - len(sequence.full_table)
        if missing > 0:
            sequence.full_table += self.full_pool.allocate(missing)

    def demote(self, sequence: Sequence, new_c: int) -> list[Demotion]:
        """Move [c, new_c) to the compressed tier's table; the caller compresses, then calls `release`.

        Sources stay allocated until `release`, so that nothing overwrites them before they are read. A block that the
        compressed tier already holds is shared and not among the demotions. What is behind the sliding window of the
        next query is freed first.

        Raises
        ------
        OutOfBlocks
            Nothing has moved then.
        """
        if new_c == sequence.compressed_len and self.sliding_window is None:
            return []
        if new_c % BLOCK_SIZE or not sequence.compressed_len <= new_c <= sequence.num_computed:
            raise IntegrityError(
                f"demotion to {new_c}: expected a multiple of {BLOCK_SIZE} from compressed_len "
                f"{sequence.compressed_len} to num_computed {sequence.num_computed}"
            )
        if self.sliding_window is not None:
            self._free_behind_window(sequence)
        if new_c == sequence.compressed_len:
            return []
        first, last = len(sequence.compressed_table), new_c // BLOCK_SIZE
        sources = sequence.full_table[: last - first]
        skipped = sources.count(0)
        targets, fresh = self._compressed_blocks(sequence, first + skipped, last)
        del sequence.full_table[: last - first]
        sequence.compressed_table += [0] * skipped + targets
        sequence.compressed_len = new_c
        pairs = list(zip(sources[skipped:], targets, range(first + skipped, last), strict=True))
        self.full_pool.free(source for source, target, _ in reversed(pairs) if target not in fresh)
        return [Demotion(sequence, source, target, i) for source, target, i in pairs if target in fresh]

    def release(self, demotions: Iterable[Demotion]) -> None:
        """Free the sources of demotions that the engine has compressed."""
        # The end of a prefix is of no use without its beginning, so the beginning is the last to be evicted.
        self.full_pool.free([demotion.source for demotion in demotions][::-1])

    def forget(self, demotions: Iterable[Demotion]) -> None:
        """Nobody may find the targets of demotions that the engine failed to compress."""
        self.compressed_pool.forget(demotion.target for demotion in demotions)

    def commit(self, sequence: Sequence, end: int) -> None:
        """Positions up to ``end`` have been computed; the blocks they completed can be found from now on."""
        start, sequence.num_computed = sequence.num_computed, end
        self.prefixes.register_full(sequence, start)

    def _compressed_blocks(self, sequence: Sequence, first: int, last: int) -> tuple[list[int], set[int]]:
        """Own compressed blocks for blocks [first, last) of a sequence; the second result holds those to be filled."""
        if not self.prefixes.serves(sequence):
            fresh = self.compressed_pool.allocate(last - first)
            return fresh, set(fresh)
        names = self.prefixes.hashes(sequence, last)[first:]
        found = [self.compressed_pool.find(name) for name in names]
        shared = [block for block in found if block is not None]
        self.compressed_pool.share(shared)
        try:
            fresh = self.compressed_pool.allocate(len(names) - len(shared))
        except OutOfBlocks:
            self.compressed_pool.free(shared[::-1])
            raise
        rest = iter(fresh)
        blocks = [next(rest) if block is None else block for block in found]
        for block, name in zip(blocks, names, strict=True):
            self.compressed_pool.register(block, name)
        return blocks, set(fresh)

    def _free_behind_window(self, sequence: Sequence) -> None:
        behind = blocks_behind(sequence.num_computed, self.sliding_window)
        in_compressed = min(behind, len(sequence.compressed_table))
        for table, pool, count in (
            (sequence.compressed_table, self.compressed_pool, in_compressed),
            (sequence.full_table, self.full_pool, behind - in_compressed),
        ):
            pool.free(used_blocks(table[:count]))
            table[:count] = [0] * count

    def slots(self, sequence: Sequence, start: int, end: int) -> NDArray[np.int32]:
        """Full-tier slots (block * B + offset) of positions [start, end)."""
        offsets = np.arange(start, end, dtype=np.int32) - np.int32(sequence.compressed_len)
        return np.array(sequence.full_table, np.int32)[offsets // BLOCK_SIZE] * BLOCK_SIZE + offsets % BLOCK_SIZE

    def free(self, sequence: Sequence) -> None:
        """Give up all blocks of the sequence and forget what it computed."""
        self.full_pool.free(reversed(used_blocks(sequence.full_table)))
        self.compressed_pool.free(reversed(used_blocks(sequence.compressed_table)))
        sequence.full_table = []
        sequence.compressed_table = []
        sequence.num_computed = sequence.compressed_len = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Between steps: the tables of ``sequences`` are all there is, and hold exactly the computed positions.

        A block with a hash is in the tables of sequences with that prefix only.

        Raises
        ------
        IntegrityError
            With all counts.
        """
        owners: dict[str, Counter[int]] = {"full": Counter(), "compressed": Counter()}
        for sequence in sequences:
            c, n = sequence.compressed_len, sequence.num_computed
            tables = len(sequence.full_table), len(sequence.compressed_table)
            if c > n or tables != (blocks_for(n - c), c // BLOCK_SIZE) or c % BLOCK_SIZE:
                raise IntegrityError(f"sequence: {n} tokens, {c} compressed, but tables of {tables} blocks")
            self.prefixes.check_integrity(sequence)
            owners["full"].update(used_blocks(sequence.full_table))
            owners["compressed"].update(used_blocks(sequence.compressed_table))
        for key, pool in (("full", self.full_pool), ("compressed", self.compressed_pool)):
            pool.check_integrity()
            counts = {block: count for block, count in enumerate(pool.ref_counts) if count}
            if counts != dict(owners[key]):
                raise IntegrityError(
                    f"{pool.name} tier: {pool.num_used} of {pool.num_blocks - 1} blocks used, references {counts}, "
                    f"table entries {dict(owners[key])}"
                )
