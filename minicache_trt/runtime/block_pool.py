"""Block ids of one tier: which are free, and how many owners the others have."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocks(Exception):
    """A pool cannot serve a request now; the scheduler answers by preempting a sequence."""


class IntegrityError(RuntimeError):
    """Block accounting contradicts itself: a defect of this package, never of the input."""


class BlockPool:
    """Ids 1 .. num_blocks - 1 of one tier; block 0 is never allocated. Knows no tensor.

    The free list is a stack: the block freed last is allocated first. So pools touch no more memory than sequences ever
    held at once, and what they touch is warm.

    Parameters
    ----------
    num_blocks : int
        Blocks of the tier, block 0 included.
    name : str
        For messages, ``full`` or ``compressed``.
    """

    def __init__(self, num_blocks: int, name: str) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks: expected a positive number, got {num_blocks}")
        self.name = name
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks with one owner each, or none at all.

        Raises
        ------
        OutOfBlocks
            With the numbers wanted, free and in the pool.
        """
        if count > len(self._free):
            raise OutOfBlocks(
                f"{self.name} tier: {count} blocks wanted, {len(self._free)} of {self.num_blocks - 1} free"
            )
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block; a block without references joins the free list."""
        for block in blocks:
            if self.ref_counts[block] < 1:
                raise IntegrityError(f"{self.name} tier: block {block} freed, but it has no owner")
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free.append(block)

    def check_integrity(self) -> None:
        """Every block but 0 is either free or owned, and none is both.

        Raises
        ------
        IntegrityError
            With all counts.
        """
        free = set(self._free)
        owned = {block for block, count in enumerate(self.ref_counts) if count > 0}
        if len(free) != len(self._free) or owned & free or owned | free != set(range(1, self.num_blocks)):
            raise IntegrityError(
                f"{self.name} tier: {self.num_blocks} blocks, free list {sorted(self._free)}, owned "
                f"{ {block: self.ref_counts[block] for block in sorted(owned)} }"
            )
