"""What a kernel must move or compute: the numerators of `kernels.py`."""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import PARTS
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout, plan_layout

PER_MEMBER = ("residual", "residual_params", "exact", "exact_params")
"""Pools with a part for each layer of the group, of which a reader takes one."""
ELEMENT = 2
"""Bytes of a compute-type number."""


@dataclass(frozen=True)
class Context:
    """Where a sequence's tokens are: ``compressed`` of them, a multiple of the block size, then ``exact`` ones."""

    compressed: int
    exact: int

    @classmethod
    def of(cls, tokens: int, compresses: bool, window: int = 64) -> Context:
        compressed = max(0, tokens - window) // BLOCK_SIZE * BLOCK_SIZE if compresses else 0
        return cls(compressed, tokens - compressed)


def read_block_bytes(layout: StreamLayout) -> int:
    """Bytes of a stream's block that one layer reads."""
    total = 0
    for kind, pool in layout.pools.items():
        size = pool.block_bytes(ELEMENT)
        own = kind in PER_MEMBER or (kind == "norms" and layout.stream.merge == "slerp")
        total += size // len(layout.stream.layers) if own else size
    return total


def write_block_bytes(layout: StreamLayout) -> int:
    """Bytes of a stream's block, all of which compressing writes."""
    return sum(pool.block_bytes(ELEMENT) for pool in layout.pools.values())


def vector_bytes(config: ModelConfig) -> int:
    """Bytes of one token's keys, or values, of one layer."""
    return config.num_kv_heads * config.head_dim * ELEMENT


def layer_layouts(config: ModelConfig, plan: CompressionPlan, layer: int) -> list[StreamLayout]:
    """Key and value stream of a layer; none for a plan that does not compress."""
    layouts = plan_layout(plan, config)
    return [layouts[plan.find(part, layer)[0]] for part in PARTS] if plan.compresses else []


def decode_bytes(config: ModelConfig, plan: CompressionPlan, batch: int, context: Context, layer: int = 0) -> int:
    """Bytes one layer's decode attention must read and write."""
    compressed = sum(map(read_block_bytes, layer_layouts(config, plan, layer))) * context.compressed // BLOCK_SIZE
    queries = 2 * config.num_heads * config.head_dim * ELEMENT
    return batch * (compressed + 2 * vector_bytes(config) * context.exact + queries)


def compress_bytes(layout: StreamLayout, blocks: int) -> int:
    """Bytes compressing blocks of a stream must read and write."""
    read = len(layout.stream.layers) * vector_bytes(layout.config) * BLOCK_SIZE
    return blocks * (read + write_block_bytes(layout))


def restore_bytes(layout: StreamLayout, blocks: int) -> int:
    """Bytes restoring one layer's blocks must read and write."""
    return blocks * (read_block_bytes(layout) + vector_bytes(layout.config) * BLOCK_SIZE)


def prefill_flops(config: ModelConfig, history: int, chunk: int) -> int:
    """Operations of both products of causal attention of ``chunk`` queries behind ``history`` tokens."""
    pairs = chunk * history + chunk * (chunk + 1) // 2
    return 4 * config.num_heads * config.head_dim * pairs
