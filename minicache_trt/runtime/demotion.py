"""When a block moves to the compressed tier: a function of positions alone."""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.config import BLOCK_SIZE
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
