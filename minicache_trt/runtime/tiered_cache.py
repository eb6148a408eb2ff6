"""The two tiers of a sequence: which position is where, and when blocks move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.block_pool import BlockPool, IntegrityError
from minicache_trt.runtime.request import Sequence


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold ``num_tokens`` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def blocks_behind(position: int, sliding_window: int | None) -> int:
    """First blocks of a sequence that no query from ``position`` on sees."""
    return 0 if sliding_window is None else max(0, position + 1 - sliding_window) // BLOCK_SIZE


def used_blocks(table: list[int]) -> list[int]:
    """Entries of a table but those behind a sliding window."""
    return [block for block in table if block]


@dataclass(frozen=True)
class DemotionRule:
    """How much of its history a query reads from the compressed tier: a function of its position alone.

    A request's output therefore does not depend on chunking, preemption or what else runs::

        position p < prompt_len     k = p // quantum,  c = B * floor(max(0, k * quantum - window) / B)
        position p >= prompt_len                       c = B * floor(max(0, p - window) / B)

    Parameters
    ----------
    window : int
        Most recent tokens that stay exact.
    quantum : int
        Prompt tokens that see one another exactly; a multiple of the block size.
    """

    window: int
    quantum: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: expected a positive number, got {self.window}")
        if self.quantum < 1 or self.quantum % BLOCK_SIZE:
            raise ValueError(f"quantum: expected a positive multiple of {BLOCK_SIZE}, got {self.quantum}")

    def compressed_len(self, position: int, prompt_len: int) -> int:
        """Compressed tokens c that the query at ``position`` attends to; it sees [c, position] exactly."""
        reference = position // self.quantum * self.quantum if position < prompt_len else position
        return max(0, reference - self.window) // BLOCK_SIZE * BLOCK_SIZE

    def chunk_end(self, start: int, prompt_len: int) -> int:
        """Largest end such that c is constant for the queries in [start, end), and at most one side of prompt_len."""
        change = self.compressed_len(start, prompt_len) + BLOCK_SIZE + self.window
        if start < prompt_len:
            return min(prompt_len, -(-change // self.quantum) * self.quantum)
        return change


@dataclass(frozen=True)
class Demotion:
    """One block for `Engine.compress`: from a full-tier source to a compressed-tier target."""

    sequence: Sequence
    source: int
    target: int
    block_index: int


class TieredCache:
    """Block tables of all sequences over two pools.

    For a sequence with n computed tokens and c of them compressed::

        positions [0, c)   compressed_table[0 : c/B]           grows in `demote` only
        positions [c, n)   full_table[0 : ceil((n - c)/B)]     grows in `reserve`, shrinks in `demote`

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
    sliding_window : int, optional
        Tokens a query sees, itself included; default all.
    """

    def __init__(
        self,
        rule: DemotionRule,
        full_pool: BlockPool,
        compressed_pool: BlockPool,
        compresses: bool,
        sliding_window: int | None = None,
    ) -> None:
        self.sliding_window = sliding_window
        self.rule = rule
        self.full_pool = full_pool
        self.compressed_pool = compressed_pool
        self.compresses = compresses

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

    def peak_blocks(self, sequence: Sequence, end: int) -> tuple[int, int]:
        """Most (full, compressed) blocks the sequence holds while it computes up to position ``end``."""
        start = sequence.num_computed
        full, compressed = (len(used_blocks(table)) for table in (sequence.full_table, sequence.compressed_table))
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

        Sources stay allocated until `release`, so that nothing overwrites them before they are read. What is behind the
        sliding window of the next query is freed first.

        Raises
        ------
        OutOfBlocks
            Nothing has moved then.
        """
        if new_c % BLOCK_SIZE or not sequence.compressed_len <= new_c <= sequence.num_computed:
            raise IntegrityError(
                f"demotion to {new_c}: expected a multiple of {BLOCK_SIZE} from compressed_len "
                f"{sequence.compressed_len} to num_computed {sequence.num_computed}"
            )
        self._free_behind_window(sequence)
        first = len(sequence.compressed_table)
        count = new_c // BLOCK_SIZE - first
        sources = sequence.full_table[:count]
        skipped = sources.count(0)
        targets = [0] * skipped + self.compressed_pool.allocate(count - skipped)
        del sequence.full_table[:count]
        sequence.compressed_table += targets
        sequence.compressed_len = new_c
        moves = enumerate(zip(sources, targets, strict=True), first)
        return [Demotion(sequence, source, target, index) for index, (source, target) in moves if source]

    def release(self, demotions: Iterable[Demotion]) -> None:
        """Free the sources of demotions that the engine has compressed."""
        self.full_pool.free(demotion.source for demotion in demotions)

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
        """Full-tier slots (block * B + offset) of positions [start, end), int32 ``(end - start,)``."""
        offsets = np.arange(start, end, dtype=np.int32) - np.int32(sequence.compressed_len)
        blocks = np.asarray(sequence.full_table, np.int32)[offsets // BLOCK_SIZE]
        slots: NDArray[np.int32] = blocks * np.int32(BLOCK_SIZE) + offsets % np.int32(BLOCK_SIZE)
        return slots

    def free(self, sequence: Sequence) -> None:
        """Give up all blocks of the sequence and forget what it computed."""
        self.full_pool.free(used_blocks(sequence.full_table))
        self.compressed_pool.free(used_blocks(sequence.compressed_table))
        sequence.full_table = []
        sequence.compressed_table = []
        sequence.num_computed = sequence.compressed_len = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Between steps: the tables of ``sequences`` are all there is, and hold exactly the computed positions.

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
