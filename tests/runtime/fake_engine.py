"""A deterministic engine in NumPy whose logits are hashes of the exact history it reads through the tables.

It has two layers: what the second one stores depends on everything the first one read, so a key or value computed
with a wrong history (another c, a stale block, a wrong position) spoils every later logit of its sequence.
`expected_logits` computes the same numbers from tokens and positions alone.
"""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np

from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BLOCK_SIZE, BuildConfig, ModelConfig
from minicache_trt.contract import (
    DECODER_INPUTS,
    PREFILL_TILE,
    compressed_block_bytes,
    full_block_bytes,
)

VOCAB = 48
WAIT = 20
"""Seconds after which a test gives up."""


def mix(value):
    """splitmix64's finaliser, elementwise on uint64."""
    value = np.asarray(value, np.uint64)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def token_value(tokens, positions):
    return mix(np.asarray(tokens, np.uint64) * np.uint64(1 << 20) + np.asarray(positions, np.uint64) + np.uint64(12345))


def compressed_value(values, block_index):
    return mix(values ^ (np.asarray(block_index, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def weigh(values):
    """Prefix sums of the values times a number that depends on their position."""
    return np.cumsum(values * mix(np.arange(len(values)) + 777), dtype=np.uint64)


def to_logits(hashes, vocab=VOCAB):
    spread = np.arange(vocab, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    return (mix(hashes[:, None] + spread) >> np.uint64(40)).astype(np.float32) / 2**21


def expected_compressed_len(position, prompt_len, window, quantum):
    """The demotion rule, one block at a time."""
    horizon = position if position >= prompt_len else position - position % quantum
    c = 0
    while c + BLOCK_SIZE <= horizon - window:
        c += BLOCK_SIZE
    return c


def expected_logits(tokens, prompt_len, build, compresses=True):
    """Logits ``[len(tokens), VOCAB]`` that the fake engine must produce, whatever the schedule."""
    count = len(tokens)
    positions = np.arange(count)
    c = np.zeros(count, int)
    if compresses:
        c = np.array([expected_compressed_len(p, prompt_len, build.window, build.quantum) for p in range(count)])

    def read(values):
        zero = np.zeros(1, np.uint64)
        exact = np.concatenate([zero, weigh(values)])
        lossy = np.concatenate([zero, weigh(compressed_value(values, positions // BLOCK_SIZE))])
        return lossy[c] + exact[positions + 1] - exact[c]

    first = token_value(tokens, positions)
    second = mix(first + read(first))
    return to_logits(read(second))


class FakeEngine:
    """Implements `minicache_trt.backends.base.Engine`; checks every batch against the contract.

    ``poison``: a position; logits of every query there become NaN.
    """

    def __init__(self, build, method="minicache", eos_token_ids=(), poison=None, vocab=VOCAB):
        self.model = ModelConfig(
            family="llama",
            num_layers=4,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            vocab_size=vocab,
            max_position_embeddings=4096,
            eos_token_ids=eos_token_ids,
        )
        self.plan = make_plan(self.model, method)
        self.build = build
        self.element_bytes = 4
        self.poison = poison
        self.num_steps = 0
        self._logits = np.zeros((0, vocab), np.float32)

    def free_memory(self):
        return None

    def allocate(self, full_blocks, compressed_blocks):
        self.full = np.zeros((full_blocks, BLOCK_SIZE, 2), np.uint64)
        self.compressed = np.zeros((compressed_blocks, BLOCK_SIZE, 2), np.uint64)
        return full_blocks * full_block_bytes(self.model, 4) + compressed_blocks * compressed_block_bytes(
            self.plan, self.model, 4
        )

    def compress(self, source_blocks, target_blocks, block_index):
        assert len(set(target_blocks.tolist())) == len(target_blocks) and 0 not in target_blocks
        assert 0 not in source_blocks and block_index.dtype == np.int32
        self.compressed[target_blocks] = compressed_value(self.full[source_blocks], block_index[:, None, None])

    def decode(self, batch):
        check_batch(batch, self.build, self.plan.compresses, len(self.full), len(self.compressed))
        self.num_steps += 1
        self._logits[:] = np.nan  # the contract lets an engine reuse its output
        hashes = np.zeros(batch.num_tokens, np.uint64)
        poisoned = []
        for index in range(len(batch.context_len)):
            rows = slice(batch.query_start[index], batch.query_start[index + 1])
            positions = batch.positions[rows]
            slots = batch.slot_mapping[rows]
            block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
            self.full[block, offset, 0] = token_value(batch.input_ids[rows], positions)
            first = self._history(batch, index, 0)
            self.full[block, offset, 1] = mix(first[positions] + weigh(first)[positions])
            hashes[rows] = weigh(self._history(batch, index, 1))[positions]
            if self.poison is not None:
                poisoned += [row for row in range(rows.start, rows.stop) if batch.positions[row] == self.poison]
        logits = to_logits(hashes, self.model.vocab_size)
        logits[poisoned, 3] = np.nan
        self._logits = logits[batch.logit_index]
        return self._logits

    def _history(self, batch, index, layer):
        n, c = batch.context_len[index], batch.compressed_len[index]
        compressed = self.compressed[batch.compressed_table[index, : c // BLOCK_SIZE], :, layer].ravel()
        full = self.full[batch.full_table[index], :, layer].ravel()
        return np.concatenate([compressed, full[: n - c]])


def check_batch(batch, build, compresses, full_blocks, compressed_blocks):
    """Every promise of the contract and of `Batch` that does not need the tokens."""
    for name in DECODER_INPUTS:
        assert getattr(batch, name).dtype == np.int32, name
    counts = np.diff(batch.query_start)
    num_tokens, sequences, decodes = batch.num_tokens, len(counts), len(batch.decode_rows)
    assert 1 <= num_tokens <= build.max_num_tokens and 1 <= sequences <= build.max_batch_size
    assert batch.query_start[0] == 0 and batch.query_start[-1] == num_tokens and (counts > 0).all()
    assert len(batch.positions) == len(batch.slot_mapping) == num_tokens
    assert (counts[:decodes] == 1).all() and (counts[decodes:] > 1).all()
    assert batch.decode_rows.tolist() == list(range(decodes))
    check_prefill_rows(batch.prefill_rows, batch.query_start[decodes:], num_tokens)
    assert batch.full_table.shape[1] >= 1 and batch.compressed_table.shape[1] >= 1
    assert (batch.logit_index[1:] > batch.logit_index[:-1]).all()
    for index in range(sequences):
        n, c = batch.context_len[index], batch.compressed_len[index]
        rows = slice(batch.query_start[index], batch.query_start[index + 1])
        assert batch.positions[rows].tolist() == list(range(n - counts[index], n))
        assert c % BLOCK_SIZE == 0 and 0 <= c <= n - counts[index] and (compresses or c == 0)
        check_table(batch.full_table[index], -(-(n - c) // BLOCK_SIZE), full_blocks)
        check_table(batch.compressed_table[index], c // BLOCK_SIZE, compressed_blocks)
        offsets = batch.positions[rows] - c
        table = batch.full_table[index]
        assert (batch.slot_mapping[rows] == table[offsets // BLOCK_SIZE] * BLOCK_SIZE + offsets % BLOCK_SIZE).all()
    written = [set((batch.slot_mapping[a:b] // BLOCK_SIZE).tolist()) for a, b in pairwise(batch.query_start)]
    for index, blocks in enumerate(written):
        others = np.delete(batch.full_table, index, axis=0)
        assert not blocks & set(others.ravel().tolist()), "a block that is written belongs to another sequence too"


def check_table(row, used, blocks):
    assert (row[:used] > 0).all() and (row[:used] < blocks).all() and (row[used:] == 0).all()


def check_prefill_rows(rows, query_start, num_tokens):
    chunks = [list(range(a, b)) for a, b in pairwise(query_start)]
    longest = max(map(len, chunks), default=0)
    assert rows.shape[0] == len(chunks) and rows.shape[1] >= longest
    assert rows.shape[1] <= max(longest + PREFILL_TILE - 1, 0)
    assert rows.shape[1] <= PREFILL_TILE or rows.shape[1] % PREFILL_TILE == 0
    for row, chunk in zip(rows.tolist(), chunks, strict=True):
        assert row == chunk + [num_tokens] * (len(row) - len(chunk))


def small_build(**changes):
    values = {"max_batch_size": 4, "max_seq_len": 512, "max_num_tokens": 128, "window": 64, "quantum": 128}
    return BuildConfig(**{**values, **changes})


class Gate:
    """Holds an engine before a step until it is opened; ``reached`` says that it has come that far."""

    def __init__(self, engine, step, error=None):
        self.opened, self.reached = threading.Event(), threading.Event()
        decode = engine.decode

        def gated(batch):
            if engine.num_steps == step and not self.opened.is_set():
                self.reached.set()
                assert self.opened.wait(WAIT)
                if error is not None:
                    raise error
            return decode(batch)

        engine.decode = gated
