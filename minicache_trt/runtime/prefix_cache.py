"""Finding what was computed before: names of block contents, and the longest prefix that both tiers still hold."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.runtime.block_pool import BlockPool, IntegrityError
from minicache_trt.runtime.demotion import DemotionRule
from minicache_trt.runtime.request import Sequence


@dataclass(frozen=True)
class Hit:
    """Blocks with which a sequence can start at position ``num_tokens``, a multiple of the block size.

    ``compressed_blocks`` hold [0, compressed_len), ``full_blocks`` hold [compressed_len, num_tokens), and
    ``compressed_len`` is the c of the query at ``num_tokens``.
    """

    num_tokens: int = 0
    compressed_len: int = 0
    full_blocks: tuple[int, ...] = ()
    compressed_blocks: tuple[int, ...] = ()


def block_hash(parent: bytes, token_ids: Tokens[int], schedule: Tokens[int]) -> bytes:
    """Name of a block's contents, 16 bytes; it cannot be made to collide.

    Parameters
    ----------
    parent : bytes
        Name of the block before; of the first one, `root_hash`.
    token_ids : sequence of int
        Tokens of the block.
    schedule : sequence of int
        Position and c, alternating, wherever c changes within the block, its first position included: keys and values
        depend on how their tokens saw the past.
    """
    digest = blake2b(parent, digest_size=16)
    digest.update(np.array([*token_ids, *schedule], np.int64).tobytes())
    return digest.digest()


def root_hash(cache_salt: str | None) -> bytes:
    """Start of a chain; requests with different salts share nothing."""
    return blake2b((cache_salt or "").encode(errors="surrogatepass"), digest_size=16).digest()


class PrefixCache:
    """What the pools' hashes mean. A block of the full tier and what it is compressed to have the same name.

    Parameters
    ----------
    rule : DemotionRule, optional
        None when nothing is ever demoted.
    full_pool, compressed_pool : BlockPool
        The tiers' ids.
    enabled : bool
        Otherwise nothing is named and nothing is found.

    Attributes
    ----------
    lookup_tokens, hit_tokens : int
        Tokens of the sequences that were admitted, and how many of these were not computed again.
    """

    def __init__(
        self, rule: DemotionRule | None, full_pool: BlockPool, compressed_pool: BlockPool, enabled: bool
    ) -> None:
        self.rule = rule
        self.full_pool = full_pool
        self.compressed_pool = compressed_pool
        self.enabled = enabled
        self.lookup_tokens = 0
        self.hit_tokens = 0

    def serves(self, sequence: Sequence) -> bool:
        """Whether the sequence's blocks are shared with others."""
        return self.enabled and sequence.options.reuse

    def hashes(self, sequence: Sequence, count: int) -> list[bytes]:
        """Names of the sequence's first ``count`` blocks, all of whose tokens are known."""
        known = sequence.block_hashes
        while len(known) < count:
            start = len(known) * BLOCK_SIZE
            end = start + BLOCK_SIZE
            parent = known[-1] if known else root_hash(sequence.options.cache_salt)
            known.append(block_hash(parent, sequence.token_ids[start:end], self._schedule(sequence, start, end)))
        return known[:count]

    def match(self, sequence: Sequence) -> Hit:
        """The longest prefix the pools hold as the demotion schedule wants it at its end.

        The last known token, and all tokens whose logits are wanted, are left to be computed.
        """
        if not self.serves(sequence):
            return Hit()
        limit = sequence.num_tokens - 1
        if sequence.logits_start is not None:
            limit = min(limit, sequence.logits_start)
        hashes = self.hashes(sequence, limit // BLOCK_SIZE)
        full = [self.full_pool.find(name) for name in hashes]
        compressed: list[int] = []
        for name in hashes:
            block = self.compressed_pool.find(name)
            if block is None:
                break
            compressed.append(block)
        hit = Hit()
        first_full = 0  # blocks [first_full, end) are all in the full tier
        for end in range(1, len(hashes) + 1):
            if full[end - 1] is None:
                first_full = end
            c = self._compressed_len(end * BLOCK_SIZE, sequence.prompt_len)
            if first_full <= c // BLOCK_SIZE <= len(compressed):
                hit = Hit(end * BLOCK_SIZE, c)
        blocks = tuple(
            block for block in full[hit.compressed_len // BLOCK_SIZE : hit.num_tokens // BLOCK_SIZE] if block
        )
        return Hit(hit.num_tokens, hit.compressed_len, blocks, tuple(compressed[: hit.compressed_len // BLOCK_SIZE]))

    def attach(self, sequence: Sequence, hit: Hit) -> None:
        """Give an empty sequence the blocks of a hit, which nothing has evicted since `match`."""
        self.full_pool.share(hit.full_blocks)
        self.compressed_pool.share(hit.compressed_blocks)
        sequence.full_table = list(hit.full_blocks)
        sequence.compressed_table = list(hit.compressed_blocks)
        sequence.num_computed = hit.num_tokens
        sequence.compressed_len = hit.compressed_len
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = hit.num_tokens
        if self.serves(sequence):
            self.lookup_tokens += sequence.num_tokens
            self.hit_tokens += hit.num_tokens

    def register_full(self, sequence: Sequence, start: int) -> None:
        """Name the full-tier blocks that computing [start, num_computed) completed."""
        first, end = start // BLOCK_SIZE, sequence.num_computed // BLOCK_SIZE
        if first == end or not self.serves(sequence):
            return
        offset = sequence.compressed_len // BLOCK_SIZE
        names = self.hashes(sequence, end)
        for block in range(first, end):
            self.full_pool.register(sequence.full_table[block - offset], names[block])

    def check_integrity(self, sequence: Sequence) -> None:
        """The blocks of a sequence have the names of its prefixes, or none.

        Raises
        ------
        IntegrityError
            Naming the block.
        """
        names = self.hashes(sequence, sequence.num_computed // BLOCK_SIZE) if self.serves(sequence) else []
        offset = sequence.compressed_len // BLOCK_SIZE
        for pool, table, first in (
            (self.compressed_pool, sequence.compressed_table, 0),
            (self.full_pool, sequence.full_table, offset),
        ):
            for index, block in enumerate(table, first):
                name = pool.hash_of(block)
                if name is not None and (index >= len(names) or names[index] != name):
                    raise IntegrityError(f"{pool.name} tier: block {block} has another prefix than its sequence's")

    def _compressed_len(self, position: int, prompt_len: int) -> int:
        return self.rule.compressed_len(position, prompt_len) if self.rule else 0

    def _schedule(self, sequence: Sequence, start: int, end: int) -> list[int]:
        changes: list[int] = []
        while self.rule and start < end:
            c = self.rule.compressed_len(start, sequence.prompt_len)
            if not changes or changes[-1] != c:
                changes += [start, c]
            start = self.rule.chunk_end(start, sequence.prompt_len)
        return changes
