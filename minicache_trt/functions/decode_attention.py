"""Decodes of a step: attention of one-token sequences over both tiers, block by block.

    full_work, compressed_work ──split into tiles──► Scan: gather a tile's keys ─► logits ─► weights ─► gather values
                                                        └─ per block: maximum, sum of weights, weighted values ──┐
                                             one softmax per sequence over its blocks of both tiers ◄────────────┘

Work lists name blocks in use only, so sequences of different lengths do not pad each other, and a tile's gathered keys
fit a core's own cache. Partial results are per block of 64 tokens: they depend on nothing else in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.functions.step import MASKED, Step, ceil_div, scan
from minicache_trt.functions.stream_loading import load_stream
from minicache_trt.functions.stream_restoring import Rotation, block_rotation, restore_stream
from minicache_trt.functions.streams import prepare_query, stream_logits, stream_values
from minicache_trt.functions.tape import Emitter

TILE_BYTES = 1 << 19
"""Gathered (or unpacked) keys of one tile: with what is made of them, they stay in a core's cache until used."""
SHORT_TILES = 8
"""Work of up to so many tiles is done in half as many of twice the size: starting a tile would cost more."""


@dataclass(frozen=True)
class Work:
    """One tier's blocks, padded to whole tiles with blocks of no sequence.

    ``trips``, ``size`` ``[1]``: tiles, and blocks in a tile. Of each of the W = trips * size blocks, int64 ``[W]``:
    ``row``, decode it belongs to (Nd: none); ``query``, a row of q to go with it; ``column``, its number within the
    tier; ``block``, its id; ``target``, its place in ``[Nd + 1, M]``, M blocks of both tiers.
    """

    trips: ir.Value
    size: ir.Value
    row: ir.Value
    query: ir.Value
    column: ir.Value
    block: ir.Value
    target: ir.Value

    def tiles(self, g: Emitter, x: ir.Value, *shape: int) -> ir.Value:
        """``[W, ...]`` as ``[trips, size, ...]``."""
        return g.reshape(x, [self.trips, self.size, *shape])


PEAK, WEIGHT, VALUES = 0, 1, 2
"""First component of the parts of a block's partial result ``[H, G, 2 + D]``, H by KV head: its largest logit, the sum
of its weights relative to that, and the values they weigh."""


def decode_attention(step: Step) -> ir.Value:
    """``[Nd, Hq * D]``."""
    g, config, inputs = step.g, step.config, step.inputs
    shape = [config.num_kv_heads, config.group_size, config.head_dim]
    count = g.extent(inputs["decode_rows"], 0)
    q = g.reshape(step.q, [-1, *shape])
    tiers = ["full"] if step.streams is None else ["full", "compressed"]
    widths = {tier: g.extent(inputs[f"{tier}_table"], 1) for tier in tiers}
    total = widths["full"] if step.streams is None else g.op("Add", *widths.values())
    work = _work(step, "full", count, total, None, config.head_dim)
    targets, partials = [work.target], [_full_tier(step, work, q, count)]
    if step.streams is not None:
        rank = max(step.streams.key.layout.stream.rank, step.streams.value.layout.stream.rank, config.head_dim)
        work = _work(step, "compressed", count, total, widths["full"], rank)
        targets.append(work.target)
        partials.append(_compressed_tier(step, work, q, count))
    out = _combine(step, count, total, targets, partials)
    return g.reshape(out, [count, config.num_heads * config.head_dim])


def _work(step: Step, tier: str, count: ir.Value, total: ir.Value, before: ir.Value | None, width: int) -> Work:
    """The tier's work list in tiles; ``before``: blocks of the other tier in front of this one's in ``[Nd + 1, M]``."""
    g, table = step.g, step.inputs[f"{tier}_table"]
    items, columns = step.inputs[f"{tier}_work"], g.extent(table, 1)
    tile = max(1, TILE_BYTES // (step.config.num_kv_heads * BLOCK_SIZE * width * 4))
    length, one = g.extent(items, 0), g.constant([1])
    short = g.op("LessOrEqual", length, g.constant([SHORT_TILES * tile]))
    limit = g.op("Where", short, g.constant([2 * tile]), g.constant([tile]))
    trips = g.op("Max", ceil_div(g, length, limit), one)
    size = g.op("Max", ceil_div(g, length, trips), one)
    missing = g.op("Sub", g.op("Mul", trips, size), length)
    padding = g.op("Expand", g.op("Mul", count, columns), missing)
    place = g.concat([items, padding], 0)
    row, column = g.op("Div", place, columns), g.op("Mod", place, columns)
    flat = g.concat([g.reshape(table, [-1]), g.constant([0])], 0)
    block = g.op("Gather", flat, place, attrs={"axis": 0})
    target = g.op("Add", g.op("Mul", row, total), column)
    # A block of no decode is weighed by whatever query there is: its partial result goes nowhere.
    query = g.op("Min", row, g.op("Sub", g.extent(step.inputs["slot_mapping"], 0), one))
    return Work(trips, size, row, query, column, block, target if before is None else g.op("Add", target, before))


def _full_tier(step: Step, work: Work, q: ir.Value, count: ir.Value) -> ir.Value:
    g, inputs = step.g, step.inputs
    length = inputs["context_len"]
    if step.streams is not None:
        length = g.op("Sub", length, inputs["compressed_len"])
    used = _used(step, work, length, count)
    offset = g.constant(list(range(BLOCK_SIZE)))
    visible = g.op("Less", offset, used)
    if step.config.sliding_window is not None:
        behind = g.op("Sub", used, g.constant(step.config.sliding_window))
        visible = g.op("And", visible, g.op("GreaterOrEqual", offset, behind))
    mask = g.op("Where", visible, g.floats(0.0), g.floats(MASKED))
    place = g.unsqueeze(work.block, 1)
    zero = g.op("Mul", place, g.constant(0))
    keys, values = (g.concat([place, g.op("Add", zero, g.constant(part))], 1) for part in (0, 1))

    def body(tile: list[ir.Value]) -> ir.Value:
        row, key, value, hidden = tile
        queries = step.scaled(g.op("Gather", q, row, attrs={"axis": 0}))
        logits = g.op("MatMul", queries, g.swap_last(step.widened(g.op("GatherND", step.kv, key)), 4))
        logits = g.op("Add", step.capped(logits), hidden)

        def attend(weights: ir.Value) -> ir.Value:
            return g.op("MatMul", weights, step.widened(g.op("GatherND", step.kv, value)))

        return _weigh(g, logits, attend)

    int64, float32 = ir.DataType.INT64, ir.DataType.FLOAT
    slices = [
        (work.tiles(g, work.query), int64, 1),
        (work.tiles(g, keys, 2), int64, 2),
        (work.tiles(g, values, 2), int64, 2),
        (work.tiles(g, mask, 1, 1, BLOCK_SIZE), float32, 4),
    ]
    return _scanned(step, "full_tile", slices, body)


def _used(step: Step, work: Work, length: ir.Value, count: ir.Value) -> ir.Value:
    """``[W, 1, 1, 1]``: of a sequence's ``length [S]`` tokens, those from the start of each block on; 0 in padding."""
    g = step.g
    length = g.concat([g.slice(length, g.constant([0]), count, 0), g.constant([0])], 0)
    used = g.op("Gather", length, work.row, attrs={"axis": 0})
    return g.unsqueeze(g.op("Sub", used, g.op("Mul", work.column, g.constant(BLOCK_SIZE))), 1, 2, 3)


def _compressed_tier(step: Step, work: Work, q: ir.Value, count: ir.Value) -> ir.Value:
    """Blocks of the compressed tier are complete, so nothing is masked but what is behind a sliding window."""
    assert step.streams is not None
    g, key, value = step.g, step.streams.key, step.streams.value
    key_maps, value_maps = step.maps("key"), step.maps("value")
    query = prepare_query(g, key.layout, key_maps, step.scaled(q))
    rebuilt = key.layout.stream.basis == "pre_rope"
    int64, float32 = ir.DataType.INT64, ir.DataType.FLOAT
    slices = [(work.tiles(g, work.query), int64, 1), (work.tiles(g, work.block), int64, 1)]
    if rebuilt:
        rotation = block_rotation(g, step.config, work.column)
        half = step.config.head_dim // 2
        slices += [(work.tiles(g, part, 1, BLOCK_SIZE, half), float32, 4) for part in (rotation.cos, rotation.sin)]
    window = step.config.sliding_window
    if window is not None:
        behind = g.op("Sub", _used(step, work, step.inputs["context_len"], count), g.constant(window))
        visible = g.op("GreaterOrEqual", g.constant(list(range(BLOCK_SIZE))), behind)
        mask = g.op("Where", visible, g.floats(0.0), g.floats(MASKED))
        slices.append((work.tiles(g, mask, 1, 1, BLOCK_SIZE), float32, 4))

    def body(tile: list[ir.Value]) -> ir.Value:
        row, block, *angles = tile
        hidden = angles.pop() if window is not None else None
        own = query.rows(g, row)
        stream = load_stream(g, key.layout, key.member, step.pools("key"), block)
        if rebuilt:
            keys = restore_stream(g, key.layout, stream, key_maps, Rotation(angles[0], angles[1]))
            logits = g.op("MatMul", own.raw, g.swap_last(keys, 4))
        else:
            logits = stream_logits(g, stream, own)
        if key_maps.slots is not None:
            logits = g.op("Gather", logits, key_maps.slots, attrs={"axis": 1})
        logits = step.capped(logits)
        if hidden is not None:
            logits = g.op("Add", logits, hidden)

        def attend(weights: ir.Value) -> ir.Value:
            history = load_stream(g, value.layout, value.member, step.pools("value"), block)
            return stream_values(g, history, weights, value_maps)

        return _weigh(g, logits, attend)

    return _scanned(step, "compressed_tile", slices, body)


def _weigh(g: Emitter, logits: ir.Value, attend: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """Partial results ``[N, H, G, 2 + D]`` of blocks with ``logits [N, H, G, B]``."""
    peak = g.reduce("Max", logits, 3)
    weights = g.op("Exp", g.op("Sub", logits, peak))
    return g.concat([peak, g.reduce("Sum", weights, 3), attend(weights)], 3)


def _scanned(
    step: Step,
    name: str,
    slices: Sequence[tuple[ir.Value, ir.DataType, int]],
    body: Callable[[list[ir.Value]], ir.Value],
) -> ir.Value:
    """The body's partial results of every tile, ``[W, H, G, 2 + D]``."""
    g, config = step.g, step.config
    shape = [config.num_kv_heads, config.group_size, VALUES + config.head_dim]
    (stacked,) = scan(g, name, slices, lambda tile: [body(tile)], [[None, *shape]])
    return g.reshape(stacked, [-1, *shape])


def _combine(
    step: Step, count: ir.Value, total: ir.Value, targets: list[ir.Value], partials: list[ir.Value]
) -> ir.Value:
    """One softmax per decode over its blocks: ``[Nd, H, G, D]``."""
    g, config = step.g, step.config
    shape = [config.num_kv_heads, config.group_size, VALUES + config.head_dim]
    rows = g.op("Add", count, g.constant([1]))
    places = g.op("Concat", g.op("Mul", rows, total), g.constant(shape), attrs={"axis": 0})
    absent = np.zeros(shape[-1], np.float32)
    absent[PEAK] = MASKED
    spread = g.op("Expand", g.floats(absent), places)
    spread = g.op("ScatterND", spread, g.unsqueeze(g.concat(targets, 0), 1), g.concat(partials, 0))
    spread = g.reshape(spread, [rows, total, *shape])
    peak = g.slice(spread, PEAK, WEIGHT, 4)
    share = g.op("Exp", g.op("Sub", peak, g.reduce("Max", peak, 1)))
    summed = g.op("Mul", g.slice(spread, WEIGHT, shape[-1], 4), share)
    summed = g.slice(g.reduce("Sum", summed, 1, keep=False), g.constant([0]), count, 0)
    return g.op("Div", g.slice(summed, 1, shape[-1] - 1, 3), g.slice(summed, 0, 1, 3))
