"""Prefill chunks of a step: history restored, attention causal, tiled over queries, head by head within a tile.

    chunks ──► q by tile and head ──► Scan over tiles: keys a tile can see, its mask ──► Scan over KV heads: softmax

A head's logits of one tile stay in a core's own cache. How many keys a tile can see follows from the shapes of
prefill_rows and prefill_past, so no shape depends on data.
"""

from __future__ import annotations

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import PREFILL_TILE
from minicache_trt.functions.step import MASKED, Step, arange, scan
from minicache_trt.functions.stream_loading import load_stream
from minicache_trt.functions.stream_restoring import block_rotation, restore_stream
from minicache_trt.functions.streams import to_heads

SMALLEST_TILE = 32
"""Queries of a tile at least, however many query heads share a KV head."""


def prefill_attention(step: Step, decoded: ir.Value) -> ir.Value:
    """Attention of the prefill chunks, written behind ``decoded``; ``[T, Hq*D]``. Steps without any skip it whole."""
    g = step.g
    any_chunk = g.op("Greater", g.op("Squeeze", g.extent(step.inputs["prefill_rows"], 0)), g.constant(0))
    branches = {}
    for name, attend in (("then_branch", _prefill_chunks), ("else_branch", lambda step, x: step.g.op("Identity", x))):
        with g.subgraph() as tape:
            out = attend(step, decoded)
        out.type = ir.TensorType(ir.DataType.FLOAT)
        branches[name] = ir.Graph([], [out], nodes=tape.nodes, name=f"prefill_{name}")
    return g.op("If", any_chunk, attrs=branches)


def _prefill_chunks(step: Step, decoded: ir.Value) -> ir.Value:
    g, config, inputs = step.g, step.config, step.inputs
    heads, group, dim = config.num_kv_heads, config.group_size, config.head_dim
    rows = inputs["prefill_rows"]
    tokens, chunks, width = g.extent(inputs["q"], 0), g.extent(rows, 0), g.extent(rows, 1)
    tile = _tile(step, width)
    trips = g.op("Div", width, tile)
    real = g.op("Min", rows, g.op("Sub", tokens, g.constant([1])))
    q = g.reshape(g.op("Gather", step.q, real, attrs={"axis": 0}), [chunks, trips, tile, heads, group, dim])
    queries = g.op("Mul", tile, g.constant([group]))
    q = g.reshape(g.transpose(q, [1, 3, 0, 4, 2, 5]), [trips, heads, chunks, queries, dim])
    attended = _attend(step, q, trips, tile, chunks)
    attended = g.reshape(attended, [trips, heads, chunks, group, tile, dim])
    attended = g.reshape(g.transpose(attended, [2, 0, 4, 1, 3, 5]), [chunks, width, heads * group * dim])
    # One row more than there are tokens: padded queries write there.
    free = g.op("Sub", g.op("Add", tokens, g.constant([1])), g.extent(inputs["decode_rows"], 0))
    blank = g.op("Expand", g.floats(0.0), g.op("Concat", free, g.constant([heads * group * dim]), attrs={"axis": 0}))
    out = g.op("ScatterND", g.concat([decoded, blank], 0), g.unsqueeze(rows, 2), attended)
    return g.slice(out, g.constant([0]), tokens, 0)


def _tile(step: Step, width: ir.Value) -> ir.Value:
    """Queries of a tile: all of a short step; fewer than `PREFILL_TILE` where several query heads share keys."""
    g, tile = step.g, PREFILL_TILE
    while tile > SMALLEST_TILE and tile * step.config.group_size > PREFILL_TILE:
        tile //= 2
    short = g.op("LessOrEqual", width, g.constant([PREFILL_TILE]))
    return g.op("Max", g.op("Where", short, width, g.constant([tile])), g.constant([1]))


def _attend(step: Step, q: ir.Value, trips: ir.Value, tile: ir.Value, chunks: ir.Value) -> ir.Value:
    """Attention of ``q [trips, H, Sp, G * tile, D]``, in the same shape."""
    g, config, inputs = step.g, step.config, step.inputs
    group, dim = config.group_size, config.head_dim
    decodes, last = g.extent(inputs["decode_rows"], 0), g.constant([2**31 - 1])
    keys, values, position, before = _history(step, chunks, decodes)
    length = g.slice(inputs["context_len"], decodes, last, 0)
    starts = g.slice(inputs["query_start"], decodes, last, 0)
    count = g.op("Sub", g.slice(starts, 1, 2**31 - 1, 0), g.slice(starts, 0, -1, 0))
    first = g.unsqueeze(g.op("Sub", length, count), 1)
    past = g.op("Add", before, g.extent(inputs["prefill_past"], 0))
    start = g.op("Mul", arange(g, trips), tile)
    limits = g.unsqueeze(g.op("Add", g.op("Add", start, tile), past), 1)
    inside = arange(g, tile)
    int64, float32 = ir.DataType.INT64, ir.DataType.FLOAT

    def attend_tile(slices: list[ir.Value]) -> list[ir.Value]:
        queries, begin, limit = slices
        at = g.float32(g.op("Add", first, g.op("Add", inside, begin)))
        ahead = g.op("Sub", g.unsqueeze(at, 2), g.slice(position, g.constant([0]), limit, 2))
        seen = g.op("Min", ahead, g.floats(0.0))
        if config.sliding_window is not None:
            # How far in front of the query a key is, or how far behind its window.
            behind = g.op("Sub", g.floats(float(config.sliding_window - 1)), ahead)
            seen = g.op("Min", seen, behind)
        hidden = g.unsqueeze(g.op("Mul", seen, g.floats(-MASKED)), 1)

        def attend_head(slices: list[ir.Value]) -> list[ir.Value]:
            query, *history = slices
            key, value = (g.slice(x, g.constant([0]), limit, 1) for x in history)
            logits = g.op("MatMul", step.scaled(query), g.swap_last(key, 3))
            logits = g.op("Add", g.reshape(step.capped(logits), [chunks, group, tile, -1]), hidden)
            weights = g.op("Softmax", logits, attrs={"axis": -1})
            weights = g.reshape(weights, [chunks, g.op("Mul", tile, g.constant([group])), -1])
            return [g.op("MatMul", weights, value)]

        heads = [(x, float32, 3) for x in (queries, keys, values)]
        return list(scan(g, "prefill_head", heads, attend_head, [[None, None, dim]]))

    shape = [config.num_kv_heads, None, None, dim]
    inputs_of_tiles = [(q, float32, 4), (g.unsqueeze(start, 1), int64, 1), (limits, int64, 1)]
    return scan(g, "prefill_tile", inputs_of_tiles, attend_tile, [shape])[0]


def _history(step: Step, chunks: ir.Value, decodes: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Keys and values ``[H, Sp, C, D]`` and positions ``[Sp, 1, C]`` (float32) of all a chunk may attend to.

    The last result, ``[1]``, is how many of the C entries are the compressed tier's.

    Entries of the compressed tier past the compressed length get a position no query reaches.
    """
    g, config, inputs = step.g, step.config, step.inputs
    heads, dim = config.num_kv_heads, config.head_dim
    last = g.constant([2**31 - 1])
    full = g.slice(inputs["full_table"], decodes, last, 0)
    flat = g.reshape(full, [-1])
    tiers = [[step.recent(flat, part) for part in range(2)]]
    position = g.unsqueeze(arange(g, g.op("Mul", g.extent(full, 1), g.constant([BLOCK_SIZE]))), 0)
    before = g.constant([0])
    if step.streams is None:
        zero = g.op("Mul", g.slice(inputs["context_len"], decodes, last, 0), g.constant(0))
        position = g.op("Add", position, g.unsqueeze(zero, 1))
    else:
        blocks = g.slice(inputs["compressed_table"], decodes, last, 0)
        tiers.insert(0, _restored(step, chunks, blocks))
        before = g.op("Mul", g.extent(blocks, 1), g.constant([BLOCK_SIZE]))
        compressed = g.unsqueeze(g.slice(inputs["compressed_len"], decodes, last, 0), 1)
        history = g.unsqueeze(arange(g, before), 0)
        history = g.op("Where", g.op("Less", history, compressed), history, g.constant(2**31 - 1))
        position = g.concat([history, g.op("Add", position, compressed)], 1)

    def joined(part: int) -> ir.Value:
        """``[Sp * M, H, B, D]`` of each tier as ``[H, Sp, M * B, D]``, one behind the other."""
        split = [g.reshape(tier[part], [chunks, -1, heads, BLOCK_SIZE, dim]) for tier in tiers]
        moved = [g.reshape(g.transpose(x, [2, 0, 1, 3, 4]), [heads, chunks, -1, dim]) for x in split]
        return g.concat(moved, 2)

    return joined(0), joined(1), g.float32(g.unsqueeze(position, 1)), before


def _restored(step: Step, chunks: ir.Value, blocks: ir.Value) -> list[ir.Value]:
    """Keys and values ``[Sp * Mc, H, B, D]`` of the compressed tier, by KV head; ``blocks [Sp, Mc]``."""
    assert step.streams is not None
    g, flat = step.g, step.g.reshape(blocks, [-1])
    result = []
    for part, own in (("key", step.streams.key), ("value", step.streams.value)):
        maps, rotation = step.maps(part), None
        if own.layout.stream.basis == "pre_rope":
            columns = g.extent(blocks, 1)
            number = g.op("Mod", arange(g, g.op("Mul", chunks, columns)), columns)
            rotation = block_rotation(g, step.config, number)
        stream = load_stream(g, own.layout, own.member, step.pools(part), flat)
        result.append(to_heads(g, restore_stream(g, own.layout, stream, maps, rotation), maps))
    return result
