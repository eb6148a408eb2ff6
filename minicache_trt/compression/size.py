"""What a plan costs: the one place where cache bytes are computed.

Ratios are always against keys and values in 16 bits, whatever the engine computes in.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import MODEL, Segment
from minicache_trt.compression.stream import PARTS
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import compressed_block_bytes, full_block_bytes, plan_layout

BASELINE_BYTES = 2
"""Bytes of one number in the uncompressed cache every ratio refers to."""


def baseline_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of one token's keys and values in 16 bits, all layers."""
    return full_block_bytes(config, BASELINE_BYTES) // BLOCK_SIZE


def baseline_sequence_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of the 16-bit keys and values that a sequence of ``context`` tokens can still see, layer by layer."""
    whole = config.num_layers if config.sliding_window is None else len(config.full_layers)
    seen = whole * context + (config.num_layers - whole) * min(context, config.sliding_window or context)
    return baseline_bytes_per_token(config) // config.num_layers * seen


def compressed_blocks(plan: CompressionPlan, context: int, window: int) -> int:
    """Blocks of a sequence of ``context`` tokens that are in the compressed tier while it decodes."""
    return max(0, context - window) // BLOCK_SIZE if plan.compresses else 0


def sequence_bytes(
    plan: CompressionPlan, config: ModelConfig, context: int, window: int, element_bytes: int = BASELINE_BYTES
) -> int:
    """Bytes one decoding sequence of ``context`` tokens holds: codes, scales, norms, retained tokens, the exact window
    and the unused rest of its last block. Blocks behind a sliding window are free where all layers have one: a block
    holds every layer's tokens.

    Parameters
    ----------
    plan : CompressionPlan
    config : ModelConfig
    context : int
        Tokens of the sequence.
    window : int
        Most recent tokens kept exact (`BuildConfig.window`).
    element_bytes : int
        Bytes of a compute-type number.
    """
    compressed, full = held_blocks(config, context, compressed_blocks(plan, context, window))
    return compressed * compressed_block_bytes(plan, config, element_bytes) + full * full_block_bytes(
        config, element_bytes
    )


def held_blocks(config: ModelConfig, context: int, demoted: int) -> tuple[int, int]:
    """Compressed and full blocks that a sequence of ``context`` tokens holds once ``demoted`` were compressed."""
    behind = 0 if config.cache_window is None else max(0, context + 1 - config.cache_window) // BLOCK_SIZE
    return max(0, demoted - behind), -(-context // BLOCK_SIZE) - max(demoted, behind)


def bytes_per_token(
    plan: CompressionPlan, config: ModelConfig, context: int, window: int, element_bytes: int = BASELINE_BYTES
) -> float:
    """`sequence_bytes` per token of the context."""
    return sequence_bytes(plan, config, context, window, element_bytes) / context


def context_that_fits(plan: CompressionPlan, config: ModelConfig, memory: int, window: int) -> int | None:
    """Most tokens, a multiple of the block size, of one sequence whose cache takes at most ``memory`` bytes.

    None where a sliding window bounds the cache and all of it fits, whatever the sequence's length. The model's own
    positions are no limit here.
    """
    full = full_block_bytes(config, BASELINE_BYTES)
    if not plan.compresses:
        blocks = memory // full
    else:
        compressed = compressed_block_bytes(plan, config, BASELINE_BYTES)
        exact = -(-window // BLOCK_SIZE)
        blocks = memory // full
        if blocks >= exact:
            blocks = exact + (memory - exact * full) // compressed
    shown = config.cache_window
    if shown is not None and blocks * BLOCK_SIZE >= shown:
        # From here on every block of tokens frees one: the cache is as large as it gets within the next two blocks.
        lengths = range(shown, shown + 2 * BLOCK_SIZE)
        if max(sequence_bytes(plan, config, length, window) for length in lengths) <= memory:
            return None
    return blocks * BLOCK_SIZE


def ratio(plan: CompressionPlan, config: ModelConfig, context: int, window: int) -> float:
    """How many times smaller the cache is than in 16 bits, at this context."""
    return baseline_sequence_bytes(config, context) / sequence_bytes(plan, config, context, window)


def constant_bytes(plan: CompressionPlan) -> int:
    """Bytes of the plan's matrices, which exist once per model whatever the number of tokens."""
    return sum(value.nbytes for value in plan.matrices.values())


def _storage(segment: Segment) -> str:
    name = "16 bit" if segment.kind == MODEL else segment.format
    axis = f"/{segment.axis}" if segment.has_ranges else ""
    return f"{name}{axis}{'/hadamard' if segment.transform == 'hadamard' else ''}"


@dataclass(frozen=True)
class StreamCost:
    """One part (key or value) of one layer in the compressed tier.

    ``bytes_per_token`` is the layer's share of its stream: a stream's bytes over the number of its layers.
    """

    part: str
    layer: int
    layers: tuple[int, ...]
    merge: str
    storage: str
    retained: int
    bytes_per_token: float
    ratio: float


def layer_costs(plan: CompressionPlan, config: ModelConfig) -> list[StreamCost]:
    """Cost of every layer's keys and values, layer by layer, at 16 bits per uncompressed number."""
    baseline = config.num_kv_heads * config.head_dim * BASELINE_BYTES
    if not plan.compresses:
        return [
            StreamCost(part, layer, (layer,), "none", "16 bit", 0, float(baseline), 1.0)
            for layer in range(config.num_layers)
            for part in PARTS
        ]
    layouts = plan_layout(plan, config)
    costs = []
    for layer in range(config.num_layers):
        for part in PARTS:
            layout = layouts[plan.find(part, layer)[0]]
            stream = layout.stream
            total = sum(pool.block_bytes(BASELINE_BYTES) for pool in layout.pools.values())
            share = total / BLOCK_SIZE / len(stream.layers)
            storage = " + ".join(_storage(segment) for segment in stream.segments)
            costs.append(
                StreamCost(part, layer, stream.layers, stream.merge, storage, stream.retained, share, baseline / share)
            )
    return costs
