"""Reading a compressed stream in standard ONNX operators: gathered by block table, used without restoring it.

For a stream with dequantized latent vectors ``y = scale * code + minimum`` and norms ``nu``, the products attention
needs are linear in the codes, so scales, minima and norms are applied to queries, logits and weights::

    logits:  nu_t (q . y_t)          values:  sum_t p_t nu_t y_t
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.compression.segment import MODEL
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import SegmentLayout, StreamLayout
from minicache_trt.functions.planes import PLANE_RULES, codes_of_planes, interleave, plane_query, plane_sums, planes
from minicache_trt.functions.tape import Emitter


def block_slices(g: Emitter, pool: ir.Value, table: ir.Value, place: int) -> ir.Value:
    """``pool[table, place]``: one slice per table entry, contiguous in memory. ``table`` is int64 ``[..., M]``."""
    entries = g.unsqueeze(table, -1)
    fixed = g.op("Add", g.op("Mul", entries, g.constant(0)), g.constant(place))
    return g.op("GatherND", pool, g.op("Concat", entries, fixed, attrs={"axis": -1}))


@dataclass(frozen=True)
class SegmentValues:
    """One segment of the blocks in a table.

    ``data`` is a list of float32 ``[N, M, H, B, ...]``: the numbers themselves, or the planes of their codes. ``scale``
    and ``minimum`` broadcast against ``[N, M, H, B, length]`` and are None for numbers.
    """

    layout: SegmentLayout
    data: list[ir.Value]
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


def load_stream(
    g: Emitter, layout: StreamLayout, member: int, pools: dict[str, ir.Value], table: ir.Value
) -> StreamValues:
    """Gather the blocks of ``table`` (int64 ``[N, M]``) for the group's layer number ``member``."""
    gathered = {
        kind: g.op("Gather", pools[kind], table, attrs={"axis": 0}) for kind in ("latent", "codes") if kind in pools
    }
    params = g.float32(g.op("Gather", pools["params"], table, attrs={"axis": 0})) if "params" in pools else None
    segments = []
    for part in layout.segments:
        segment = part.segment
        if segment.kind == MODEL:
            data = _run(g, gathered["latent"], part.storage, segment.length, layout.pools["latent"].shape[-1])
            segments.append(SegmentValues(part, [g.float32(data)], None, None))
            continue
        assert params is not None
        size = segment.length * segment.bits // 8
        packed = _run(g, gathered["codes"], part.storage, size, layout.pools["codes"].shape[-1])
        axis = 4 if segment.axis == "token" else 3
        scale = g.unsqueeze(g.slice(params, part.scale, part.minimum, 3), axis)
        minimum = g.unsqueeze(g.slice(params, part.minimum, 2 * part.minimum - part.scale, 3), axis)
        segments.append(SegmentValues(part, planes(g, packed, segment.bits), scale, minimum))
    norms = g.unsqueeze(g.float32(block_slices(g, pools["norms"], table, member)), 3) if "norms" in pools else None
    if "exact" not in pools:
        return StreamValues(tuple(segments), norms, None, None, None)
    index = g.unsqueeze(g.int64(g.op("Gather", pools["retained_index"], table, attrs={"axis": 0})), 4)
    chosen = g.float32(g.op("Equal", index, g.constant(list(range(BLOCK_SIZE)))))
    exact = g.float32(block_slices(g, pools["exact"], table, member))
    return StreamValues(tuple(segments), norms, chosen, g.reduce("Max", chosen, 3), exact)


def _run(g: Emitter, x: ir.Value, start: int, length: int, total: int) -> ir.Value:
    return x if length == total else g.slice(x, start, start + length, 4)


def _drop_kept(g: Emitter, x: ir.Value, kept: ir.Value) -> ir.Value:
    return g.op("Mul", x, g.op("Sub", g.floats(1.0), kept))


def stream_logits(g: Emitter, stream: StreamValues, q: ir.Value) -> ir.Value:
    """Logits ``[N, M, H, G, B]`` of queries ``q [N, 1, H, G, D]``, retained tokens from their exact keys."""
    total: ir.Value | None = None
    for values in stream.segments:
        segment, start = values.layout.segment, values.layout.component
        part = q if len(stream.segments) == 1 else g.slice(q, start, start + segment.length, 4)
        keys = [g.swap_last(plane, 5) for plane in values.data]
        if segment.kind == MODEL or values.scale is None or values.minimum is None:
            logits = g.op("MatMul", part, keys[0])
        elif segment.axis == "channel":
            mapped, constant = plane_query(g, g.op("Mul", part, values.scale), segment.bits)
            offset = g.op("Add", constant, g.reduce("Sum", g.op("Mul", part, values.minimum), 4))
            logits = g.op("Add", _products(g, mapped, keys), offset)
        else:
            mapped, constant = plane_query(g, part, segment.bits)
            offset = g.op("Mul", g.reduce("Sum", part, 4), g.swap_last(values.minimum, 5))
            codes = g.op("Add", _products(g, mapped, keys), constant)
            logits = g.op("Add", g.op("Mul", codes, g.swap_last(values.scale, 5)), offset)
        total = logits if total is None else g.op("Add", total, logits)
    assert total is not None
    if stream.norms is not None:
        total = g.op("Mul", total, stream.norms)
    if stream.exact is not None and stream.chosen is not None and stream.kept is not None:
        exact = g.op("MatMul", g.op("MatMul", q, g.swap_last(stream.exact, 5)), stream.chosen)
        total = g.op("Add", _drop_kept(g, total, stream.kept), exact)
    return total


def _products(g: Emitter, left: list[ir.Value], right: list[ir.Value]) -> ir.Value:
    """Sum of matrix products."""
    products = [g.op("MatMul", a, b) for a, b in zip(left, right, strict=True)]
    return products[0] if len(products) == 1 else functools.reduce(lambda a, b: g.op("Add", a, b), products)


def stream_values(g: Emitter, stream: StreamValues, weights: ir.Value) -> ir.Value:
    """Weighted sums ``[N, M, H, G, D]`` per block for ``weights [N, M, H, G, B]`` (attention probabilities)."""
    w = weights if stream.kept is None else _drop_kept(g, weights, stream.kept)
    if stream.norms is not None:
        w = g.op("Mul", w, stream.norms)
    parts = []
    for values in stream.segments:
        segment = values.layout.segment
        if segment.kind == MODEL or values.scale is None or values.minimum is None:
            parts.append(g.op("MatMul", w, values.data[0]))
            continue
        channel = segment.axis == "channel"
        scaled = w if channel else g.op("Mul", w, g.swap_last(values.scale, 5))
        sums = [g.op("MatMul", scaled, plane) for plane in values.data]
        codes = plane_sums(g, sums, g.reduce("Sum", scaled, 4), segment.bits, segment.length)
        if channel:
            offset = g.op("Mul", g.reduce("Sum", w, 4), values.minimum)
            parts.append(g.op("Add", g.op("Mul", codes, values.scale), offset))
        else:
            parts.append(g.op("Add", codes, g.reduce("Sum", g.op("Mul", w, g.swap_last(values.minimum, 5)), 4)))
    total = g.concat(parts, 4)
    if stream.exact is not None and stream.chosen is not None:
        exact = g.op("MatMul", g.op("MatMul", weights, g.swap_last(stream.chosen, 5)), stream.exact)
        total = g.op("Add", total, exact)
    return total


def restore_stream(g: Emitter, stream: StreamValues) -> ir.Value:
    """Restored keys or values ``[N, M, H, B, D]``, retained tokens exact: what prefill attends to."""
    parts = []
    for values in stream.segments:
        segment, data = values.layout.segment, values.data
        if segment.kind == MODEL or values.scale is None or values.minimum is None:
            parts.append(data[0])
            continue
        unpacked = codes_of_planes(g, data, g.floats(PLANE_RULES[segment.bits][-1].offset), segment.bits)
        y = g.op("Mul", interleave(g, unpacked, segment.length), values.scale)
        parts.append(g.op("Add", y, values.minimum))
    x = g.concat(parts, 4)
    if stream.norms is not None:
        x = g.op("Mul", x, g.swap_last(stream.norms, 5))
    if stream.exact is not None and stream.chosen is not None and stream.kept is not None:
        exact = g.op("MatMul", g.swap_last(stream.chosen, 5), stream.exact)
        x = g.op("Add", _drop_kept(g, x, g.swap_last(stream.kept, 5)), exact)
    return x
