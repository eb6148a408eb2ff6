"""Block ids of one tier: which are free, how many owners the others have, and what their contents are called."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocks(Exception):
    """A pool cannot serve a request now; the scheduler answers by preempting a sequence."""


class IntegrityError(RuntimeError):
    """Block accounting contradicts itself: a defect of this package, never of the input."""


class BlockPool:
    """Ids 1 .. num_blocks - 1 of one tier; block 0 is never allocated. Knows no tensor.

    A block is in one of three states::

        owned        ref_count > 0     with or without a hash
        evictable    ref_count = 0     with a hash: its contents can be found again, until the space is needed
        free         ref_count = 0     without a hash

    Free blocks are taken before evictable ones. The free list is a stack: the block freed last is allocated first. So
    pools touch no more memory than sequences and reusable prefixes ever held at once, and what they touch is warm.
    Among the evictable the least recently used goes first.

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
        self.num_evictions = 0
        self.ref_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._evictable: dict[int, None] = {}
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks with one owner and no hash each, or none at all.

        Raises
        ------
        OutOfBlocks
            With the numbers wanted, free and in the pool.
        """
        if count > self.num_free:
            raise OutOfBlocks(f"{self.name} tier: {count} blocks wanted, {self.num_free} of {self.num_blocks - 1} free")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self.ref_counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; all are owned or evictable."""
        for block in blocks:
            if self.ref_counts[block] == 0 and block not in self._evictable:
                raise IntegrityError(f"{self.name} tier: block {block} shared, but its contents are gone")
            self._evictable.pop(block, None)
            self.ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block; without references a block is evictable if it has a hash, else free."""
        for block in blocks:
            if self.ref_counts[block] < 1:
                raise IntegrityError(f"{self.name} tier: block {block} freed, but it has no owner")
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._free.append(block)

    def find(self, content_hash: bytes) -> int | None:
        """The block whose contents have this hash."""
        return self._block_of.get(content_hash)

    def hash_of(self, block: int) -> bytes | None:
        """Hash of a block's contents, if others can find it."""
        return self._hash_of.get(block)

    def register(self, block: int, content_hash: bytes) -> None:
        """Say what an owned block holds; when another block already holds it, this one stays without a hash."""
        if self.ref_counts[block] < 1:
            raise IntegrityError(f"{self.name} tier: block {block} registered, but it has no owner")
        if content_hash not in self._block_of and block not in self._hash_of:
            self._block_of[content_hash] = block
            self._hash_of[block] = content_hash

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop the hashes of blocks, so that nobody finds them any more."""
        for block in blocks:
            content_hash = self._hash_of.pop(block, None)
            if content_hash is None:
                continue
            del self._block_of[content_hash]
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)

    def forget_all(self) -> None:
        """Drop all hashes."""
        self.forget(tuple(self._hash_of))

    def check_integrity(self) -> None:
        """Every block but 0 is free, evictable or owned, none is two of these; hashes and blocks match one to one.

        Raises
        ------
        IntegrityError
            With all counts.
        """
        free, evictable = set(self._free), set(self._evictable)
        owned = {block for block, count in enumerate(self.ref_counts) if count > 0}
        everything = sorted([*self._free, *evictable, *owned])
        hashed = set(self._hash_of)
        states_agree = everything == list(range(1, self.num_blocks)) and evictable <= hashed and not free & hashed
        if not states_agree or {h: b for b, h in self._hash_of.items()} != self._block_of:
            raise IntegrityError(
                f"{self.name} tier: {self.num_blocks} blocks, free list {sorted(self._free)}, evictable "
                f"{sorted(evictable)}, owned { {block: self.ref_counts[block] for block in sorted(owned)} }, hashed "
                f"{sorted(hashed)}, {len(self._block_of)} hashes found"
            )

    def _evict(self) -> int:
        block = next(iter(self._evictable))
        del self._evictable[block]
        del self._block_of[self._hash_of.pop(block)]
        self.num_evictions += 1
        return block
