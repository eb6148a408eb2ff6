"""Prefill chunks of a step: history restored, attention causal and tiled over queries."""

from __future__ import annotations

import math

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import PREFILL_TILE
from minicache_trt.functions.step import Step, arange, loop
from minicache_trt.functions.streams import block_rotation, block_slices, load_stream, restore_stream, to_heads


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
    tokens, decodes = g.extent(inputs["q"], 0), g.extent(inputs["decode_rows"], 0)
    chunks = g.extent(inputs["prefill_rows"], 0)
    width = config.num_heads * config.head_dim
    # One row more than there are tokens: padded queries write there.
    free = g.op("Sub", g.op("Add", tokens, g.constant([1])), decodes)
    blank = g.op("Expand", g.floats(0.0), g.op("Concat", free, g.constant([width]), attrs={"axis": 0}))
    out = g.concat([decoded, blank], 0)
    keys, values, position = _history(step, chunks, decodes)
    last = g.constant([2**31 - 1])
    length = g.slice(inputs["context_len"], decodes, last, 0)
    starts = g.slice(inputs["query_start"], decodes, last, 0)
    queries = g.op("Sub", g.slice(starts, 1, 2**31 - 1, 0), g.slice(starts, 0, -1, 0))
    first = g.unsqueeze(g.op("Sub", length, queries), 1)
    tile = g.op("Max", g.op("Min", g.extent(inputs["prefill_rows"], 1), g.constant([PREFILL_TILE])), g.constant([1]))
    trips = g.op("Div", g.extent(inputs["prefill_rows"], 1), tile)

    def attend(iteration: ir.Value, carried: ir.Value) -> ir.Value:
        return _prefill_tile(step, iteration, carried, tile, chunks, first, keys, values, position)

    looped = loop(g, "prefill_tile", trips, out, attend)
    return g.slice(looped, g.constant([0]), tokens, 0)


def _history(step: Step, chunks: ir.Value, decodes: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keys ``[Sp, H, D, C]``, values ``[Sp, H, C, D]`` and positions ``[Sp, 1, C]`` of all a chunk may attend to.

    Entries of the compressed tier past the compressed length get a position no query reaches.
    """
    g, config, inputs = step.g, step.config, step.inputs
    heads, dim = config.num_kv_heads, config.head_dim
    last = g.constant([2**31 - 1])
    full = g.slice(inputs["full_table"], decodes, last, 0)
    spans = [g.op("Mul", g.extent(full, 1), g.constant([BLOCK_SIZE]))]
    flat = g.reshape(full, [-1])
    tiers = [[block_slices(g, step.kv, flat, 0), block_slices(g, step.kv, flat, 1)]]
    position = g.unsqueeze(arange(g, spans[0]), 0)
    if step.streams is None:
        zero = g.op("Mul", g.slice(inputs["context_len"], decodes, last, 0), g.constant(0))
        position = g.op("Add", position, g.unsqueeze(zero, 1))
    else:
        blocks = g.slice(inputs["compressed_table"], decodes, last, 0)
        tiers.insert(0, _restored(step, chunks, blocks))
        spans.insert(0, g.op("Mul", g.extent(blocks, 1), g.constant([BLOCK_SIZE])))
        compressed = g.unsqueeze(g.slice(inputs["compressed_len"], decodes, last, 0), 1)
        history = g.unsqueeze(arange(g, spans[0]), 0)
        history = g.op("Where", g.op("Less", history, compressed), history, g.constant(2**31 - 1))
        position = g.concat([history, g.op("Add", position, compressed)], 1)

    def joined(part: int, perm: list[int]) -> list[ir.Value]:
        """``[Sp * M, H, B, D]`` of each tier as ``[Sp, M, H, B, D]`` in the order of ``perm``."""
        return [g.transpose(g.reshape(tier[part], [chunks, -1, heads, BLOCK_SIZE, dim]), perm) for tier in tiers]

    keys = [g.reshape(x, [chunks, heads, dim, span]) for x, span in zip(joined(0, [0, 2, 4, 1, 3]), spans, strict=True)]
    values = [
        g.reshape(x, [chunks, heads, span, dim]) for x, span in zip(joined(1, [0, 2, 1, 3, 4]), spans, strict=True)
    ]
    return g.concat(keys, 3), g.concat(values, 2), g.unsqueeze(position, 1)


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


def _prefill_tile(
    step: Step,
    iteration: ir.Value,
    carried: ir.Value,
    tile: ir.Value,
    chunks: ir.Value,
    first: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    position: ir.Value,
) -> ir.Value:
    """One tile of queries of every chunk. ``first [Sp, 1]`` is the position of each chunk's first query."""
    g, config = step.g, step.config
    heads, group, dim = config.num_kv_heads, config.group_size, config.head_dim
    start = g.op("Mul", g.unsqueeze(iteration, 0), tile)
    rows = g.slice(step.inputs["prefill_rows"], start, g.op("Add", start, tile), 1)
    real = g.op("Min", rows, g.op("Sub", g.extent(step.q, 0), g.constant(1)))
    q = g.reshape(g.op("Gather", step.q, real, attrs={"axis": 0}), [chunks, tile, heads, group, dim])
    at = g.op("Add", first, g.op("Add", arange(g, tile), start))
    visible = g.op("LessOrEqual", position, g.unsqueeze(at, 2))
    q = g.reshape(g.transpose(q, [0, 2, 3, 1, 4]), [chunks, heads, g.op("Mul", tile, g.constant([group])), dim])
    context = g.extent(keys, 3)
    logits = g.reshape(g.op("MatMul", q, keys), [chunks, heads, group, tile, context])
    logits = g.op("Where", g.unsqueeze(visible, 1, 2), logits, g.floats(-math.inf))
    weights = g.op("Softmax", logits, attrs={"axis": -1})
    weights = g.reshape(weights, [chunks, heads, g.op("Mul", tile, g.constant([group])), context])
    attended = g.reshape(g.op("MatMul", weights, values), [chunks, heads, group, tile, dim])
    attended = g.reshape(g.transpose(attended, [0, 3, 1, 2, 4]), [chunks, tile, heads * group * dim])
    return g.op("ScatterND", carried, g.unsqueeze(rows, 2), attended)
