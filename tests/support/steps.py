"""Random cache contents and one ragged step over them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from minicache_trt.compression.codec import compress_blocks
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import PREFILL_TILE, full_pools, plan_layout
from minicache_trt.model.torch_attention import Pools
from minicache_trt.runtime.batch import Batch, prefill_past, work_list


def random_pools(
    config: ModelConfig,
    plan: CompressionPlan,
    full_blocks: int = 48,
    compressed_blocks: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Pools:
    tensors = {pool.name: torch.randn(full_blocks, *pool.shape).to(dtype) for pool in full_pools(config)}
    for layout in plan_layout(plan, config):
        shape = (len(layout.stream.layers), compressed_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        block_index = torch.arange(compressed_blocks) % 3
        fields = compress_blocks(
            layout, torch.randn(shape).to(dtype), block_index, StreamConstants.of(plan, layout.index)
        )
        tensors |= {layout.pools[kind].name: values.contiguous() for kind, values in fields.items()}
    return Pools.of(config, plan, tensors)


def step(
    sequences: Sequence[tuple[int, int, int]],
    seed: int = 0,
    full_blocks: int = 48,
    compressed_blocks: int = 16,
    sliding_window: int | None = None,
) -> Batch:
    """A batch for sequences given as (length after the step, compressed length, tokens in the step), decodes first.

    Blocks that no query of the step can see through a sliding window have table entries 0.
    """
    rng = np.random.default_rng(seed)
    full_ids, compressed_ids = (iter(rng.permutation(n - 1) + 1) for n in (full_blocks, compressed_blocks))
    counts = [tokens for *_, tokens in sequences]
    starts = np.cumsum([0, *counts])
    total, decodes = int(starts[-1]), sum(tokens == 1 for tokens in counts)
    full = np.zeros((len(sequences), max(-(-(n - c) // BLOCK_SIZE) for n, c, _ in sequences)), np.int32)
    compressed = np.zeros((len(sequences), max(1, *(c // BLOCK_SIZE for _, c, _ in sequences))), np.int32)
    width = max(counts[decodes:], default=0)
    width = width if width <= PREFILL_TILE else -(-width // PREFILL_TILE) * PREFILL_TILE
    prefill = np.full((len(sequences) - decodes, width), total, np.int32)
    positions, slots = [], []
    for s, (n, c, tokens) in enumerate(sequences):
        for j in range(-(-(n - c) // BLOCK_SIZE)):
            full[s, j] = next(full_ids)
        for j in range(c // BLOCK_SIZE):
            compressed[s, j] = next(compressed_ids)
        seen = 0 if sliding_window is None else max(0, n - tokens - sliding_window + 1)
        compressed[s, : min(c, seen) // BLOCK_SIZE] = full[s, : max(0, seen - c) // BLOCK_SIZE] = 0
        if s >= decodes:
            prefill[s - decodes, :tokens] = np.arange(starts[s], starts[s + 1])
        for p in range(n - tokens, n):
            positions.append(p)
            slots.append(full[s, (p - c) // BLOCK_SIZE] * BLOCK_SIZE + (p - c) % BLOCK_SIZE)
    i32 = np.int32
    return Batch(
        input_ids=np.zeros(total, i32),
        positions=np.array(positions, i32),
        query_start=starts.astype(i32),
        context_len=np.array([n for n, *_ in sequences], i32),
        compressed_len=np.array([c for _, c, _ in sequences], i32),
        slot_mapping=np.array(slots, i32),
        full_table=full,
        compressed_table=compressed,
        full_work=work_list(full[:decodes]),
        compressed_work=work_list(compressed[:decodes]),
        decode_rows=np.arange(decodes, dtype=i32),
        prefill_rows=prefill,
        prefill_past=prefill_past([n - tokens - c for n, c, tokens in sequences[decodes:]]),
        logit_index=np.zeros(1, i32),
    )
