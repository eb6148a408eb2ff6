"""Reading a compressed stream in standard ONNX operators: gathered by block table, used without restoring it.

For a stream with dequantized latent vectors ``y = scale * code + minimum`` and norms ``nu``, the products attention
needs are linear in the codes, so scales, minima and norms are applied to queries, logits and weights::

    logits:  nu_t (q . y_t)          values:  sum_t p_t nu_t y_t
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import SegmentLayout, StreamLayout
from minicache_trt.functions.tape import Emitter


def block_slices(g: Emitter, pool: ir.Value, table: ir.Value, place: int) -> ir.Value:
    """``pool[table, place]``: one slice per table entry, contiguous in memory. ``table`` is int64 ``[..., M]``."""
    entries = g.unsqueeze(table, -1)
    fixed = g.op("Add", g.op("Mul", entries, g.constant(0)), g.constant(place))
    return g.op("GatherND", pool, g.op("Concat", entries, fixed, attrs={"axis": -1}))


def unpack(g: Emitter, packed: ir.Value, bits: int, bytes_per_vector: int, rank: int) -> ir.Value:
    """Codes as float32 ``[..., length]`` from int8 ``[..., bytes]`` of that rank.

    Works on floats, which vectorize and which every runtime has: byte value v in [-128, 127]; floor(v / 2^bits) and
    the remainder, the top code made unsigned at the end.
    """
    value = g.float32(packed)
    levels = float(1 << bits)
    parts = []
    for _ in range(8 // bits - 1):
        rest = g.op("Floor", g.op("Mul", value, g.floats(1.0 / levels)))
        parts.append(g.op("Sub", value, g.op("Mul", rest, g.floats(levels))))
        value = rest
    negative = g.op("Less", value, g.floats(0.0))
    parts.append(g.op("Where", negative, g.op("Add", value, g.floats(levels)), value))
    if len(parts) == 1:
        return parts[0]
    stacked = g.concat([g.unsqueeze(part, rank) for part in parts], rank)
    leading = g.op("Shape", packed, attrs={"start": 0, "end": rank - 1})
    shape = g.op("Concat", leading, g.constant([bytes_per_vector * (8 // bits)]), attrs={"axis": 0})
    return g.op("Reshape", stacked, shape, attrs={"allowzero": 1})


@dataclass(frozen=True)
class SegmentValues:
    """One segment of the blocks in a table: ``data [N, M, H, B, length]`` float32 (codes, or the numbers themselves);
    ``scale`` and ``minimum`` broadcast against it and are None for numbers."""

    layout: SegmentLayout
    data: ir.Value
    scale: ir.Value | None
    minimum: ir.Value | None


@dataclass(frozen=True)
class StreamValues:
    """The blocks of a table for one layer of a stream.

    ``norms [N, M, Hn, 1, B]``; ``chosen [N, M, Hn, R, B]`` 1.0 where a retained slot holds that token;
    ``kept [N, M, Hn, 1, B]`` 1.0 where any does; ``exact [N, M, H, R, D]``.
    """

    segments: tuple[SegmentValues, ...]
    norms: ir.Value | None
    chosen: ir.Value | None
    kept: ir.Value | None
    exact: ir.Value | None


def load_stream(g: Emitter, layout: StreamLayout, member: int, pools: dict[str, ir.Value], table: ir.Value) -> StreamValues:
    """Gather the blocks of ``table`` (int64 ``[N, M]``) for the group's layer number ``member``."""
    gathered = {kind: g.op("Gather", pools[kind], table, attrs={"axis": 0}) for kind in ("latent", "codes") if kind in pools}
    params = g.float32(g.op("Gather", pools["params"], table, attrs={"axis": 0})) if "params" in pools else None
    segments = []
    for part in layout.segments:
        segment = part.segment
        if segment.bits is None:
            data = _run(g, gathered["latent"], part.storage, segment.length, layout.pools["latent"].shape[-1])
            segments.append(SegmentValues(part, g.float32(data), None, None))
            continue
        assert params is not None
        size = segment.length * segment.bits // 8
        packed = _run(g, gathered["codes"], part.storage, size, layout.pools["codes"].shape[-1])
        axis = 4 if segment.axis == "token" else 3
        scale = g.unsqueeze(g.slice(params, part.scale, part.minimum, 3), axis)
        minimum = g.unsqueeze(g.slice(params, part.minimum, 2 * part.minimum - part.scale, 3), axis)
        segments.append(SegmentValues(part, unpack(g, packed, segment.bits, size, 5), scale, minimum))
    norms = g.unsqueeze(g.float32(block_slices(g, pools["norms"], table, member)), 3) if "norms" in pools else None
    if "exact" not in pools:
        return StreamValues(tuple(segments), norms, None, None, None)
    index = g.unsqueeze(g.int64(g.op("Gather", pools["retained_index"], table, attrs={"axis": 0})), 4)
    chosen = g.float32(g.op("Equal", index, g.constant(range_list(BLOCK_SIZE))))
    exact = g.float32(block_slices(g, pools["exact"], table, member))
    return StreamValues(tuple(segments), norms, chosen, g.reduce("Max", chosen, 3), exact)


def range_list(stop: int) -> list[int]:
    return list(range(stop))


def _run(g: Emitter, x: ir.Value, start: int, length: int, total: int) -> ir.Value:
    return x if length == total else g.slice(x, start, start + length, 4)


def _drop_kept(g: Emitter, x: ir.Value, kept: ir.Value) -> ir.Value:
    return g.op("Mul", x, g.op("Sub", g.floats(1.0), kept))


def stream_logits(g: Emitter, stream: StreamValues, q: ir.Value) -> ir.Value:
    """Logits ``[N, M, H, G, B]`` of queries ``q [N, 1, H, G, D]``, retained tokens from their exact keys."""
    total: ir.Value | None = None
    for values in stream.segments:
        start, length = values.layout.component, values.layout.segment.length
        part = q if len(stream.segments) == 1 else g.slice(q, start, start + length, 4)
        keys = g.swap_last(values.data, 5)
        if values.scale is None or values.minimum is None:
            logits = g.op("MatMul", part, keys)
        elif values.layout.segment.axis == "channel":
            offset = g.reduce("Sum", g.op("Mul", part, values.minimum), 4)
            logits = g.op("Add", g.op("MatMul", g.op("Mul", part, values.scale), keys), offset)
        else:
            offset = g.op("Mul", g.reduce("Sum", part, 4), g.swap_last(values.minimum, 5))
            logits = g.op("Add", g.op("Mul", g.op("MatMul", part, keys), g.swap_last(values.scale, 5)), offset)
        total = logits if total is None else g.op("Add", total, logits)
    assert total is not None
    if stream.norms is not None:
        total = g.op("Mul", total, stream.norms)
    if stream.exact is not None and stream.chosen is not None and stream.kept is not None:
        exact = g.op("MatMul", g.op("MatMul", q, g.swap_last(stream.exact, 5)), stream.chosen)
        total = g.op("Add", _drop_kept(g, total, stream.kept), exact)
    return total


def stream_values(g: Emitter, stream: StreamValues, weights: ir.Value) -> ir.Value:
    """Weighted sums ``[N, M, H, G, D]`` per block for ``weights [N, M, H, G, B]`` (attention probabilities)."""
    w = weights if stream.kept is None else _drop_kept(g, weights, stream.kept)
    if stream.norms is not None:
        w = g.op("Mul", w, stream.norms)
    parts = []
    for values in stream.segments:
        if values.scale is None or values.minimum is None:
            parts.append(g.op("MatMul", w, values.data))
        elif values.layout.segment.axis == "channel":
            product = g.op("Mul", g.op("MatMul", w, values.data), values.scale)
            parts.append(g.op("Add", product, g.op("Mul", g.reduce("Sum", w, 4), values.minimum)))
        else:
            product = g.op("MatMul", g.op("Mul", w, g.swap_last(values.scale, 5)), values.data)
            offset = g.reduce("Sum", g.op("Mul", w, g.swap_last(values.minimum, 5)), 4)
            parts.append(g.op("Add", product, offset))
    total = g.concat(parts, 4)
    if stream.exact is not None and stream.chosen is not None:
        exact = g.op("MatMul", g.op("MatMul", weights, g.swap_last(stream.chosen, 5)), stream.exact)
        total = g.op("Add", total, exact)
    return total


def restore_stream(g: Emitter, stream: StreamValues) -> ir.Value:
    """Restored keys or values ``[N, M, H, B, D]``, retained tokens exact: what prefill attends to."""
    parts = []
    for values in stream.segments:
        y = values.data
        if values.scale is not None and values.minimum is not None:
            y = g.op("Add", g.op("Mul", y, values.scale), values.minimum)
        parts.append(y)
    x = g.concat(parts, 4)
    if stream.norms is not None:
        x = g.op("Mul", x, g.swap_last(stream.norms, 5))
    if stream.exact is not None and stream.chosen is not None and stream.kept is not None:
        exact = g.op("MatMul", g.swap_last(stream.chosen, 5), stream.exact)
        x = g.op("Add", _drop_kept(g, x, g.swap_last(stream.kept, 5)), exact)
    return x
