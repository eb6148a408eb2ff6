"""Reading blocks of a compressed stream in standard ONNX operators: gathered by id, used without restoring them.

For a stream with dequantized latent vectors ``y = scale * code + minimum`` and norms ``nu``, the products attention
needs are linear in the codes, so maps, scales, minima and norms are applied to queries, logits and weights::

    logits:  nu_t (q P . y_t) + q . c          values:  (sum_t p_t nu_t y_t) P^T + c sum_t p_t

Axes: N blocks, H KV heads (slots of the stream unless said otherwise), G query heads of a KV head, B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.contract import StreamLayout
from minicache_trt.functions.planes import codes_of_planes, plane_query
from minicache_trt.functions.stream_loading import SegmentValues, StreamValues
from minicache_trt.functions.stream_maps import StreamMaps
from minicache_trt.functions.tape import Emitter


@dataclass(frozen=True)
class StreamQuery:
    """Queries prepared for one stream: ``[N, H, G, ...]`` each.

    ``raw``: as the model made them, for exact keys. ``mapped``: q P. ``residual``: q A, None without residuals.
    ``offset``: q . c ``[N, H, G, 1]``, None without a mean.
    """

    raw: ir.Value
    mapped: ir.Value
    residual: ir.Value | None
    offset: ir.Value | None

    def rows(self, g: Emitter, rows: ir.Value) -> StreamQuery:
        """The queries of ``rows``, int64 ``[N]``."""

        def gather(x: ir.Value) -> ir.Value:
            return g.op("Gather", x, rows, attrs={"axis": 0})

        raw = gather(self.raw)
        return StreamQuery(
            raw,
            raw if self.mapped is self.raw else gather(self.mapped),
            None if self.residual is None else raw if self.residual is self.raw else gather(self.residual),
            None if self.offset is None else gather(self.offset),
        )


def to_slots(g: Emitter, x: ir.Value, maps: StreamMaps) -> ir.Value:
    """KV heads (axis 1) in the order of the stream's slots."""
    return x if maps.heads is None else g.op("Gather", x, maps.heads, attrs={"axis": 1})


def to_heads(g: Emitter, x: ir.Value, maps: StreamMaps) -> ir.Value:
    """Inverse of `to_slots`."""
    return x if maps.slots is None else g.op("Gather", x, maps.slots, attrs={"axis": 1})


def prepare_query(g: Emitter, layout: StreamLayout, maps: StreamMaps, q: ir.Value) -> StreamQuery:
    """Map queries ``[N, H, G, D]`` (by KV head) into the stream's space."""
    raw = to_slots(g, q, maps)
    if layout.stream.basis == "pre_rope":
        return StreamQuery(raw, raw, None, None)
    mapped = raw if maps.map is None else g.op("MatMul", raw, maps.map)
    residual = None
    if layout.residual is not None:
        residual = raw if maps.residual_map is None else g.op("MatMul", raw, maps.residual_map)
    offset = None if maps.offset is None else g.reduce("Sum", g.op("Mul", raw, maps.offset), 3)
    return StreamQuery(raw, mapped, residual, offset)


def drop_kept(g: Emitter, x: ir.Value, kept: ir.Value) -> ir.Value:
    return g.op("Mul", x, g.op("Sub", g.floats(1.0), kept))


def stream_logits(g: Emitter, stream: StreamValues, q: StreamQuery) -> ir.Value:
    """Logits ``[N, H, G, B]`` of queries over the stream's keys, retained tokens from their exact ones."""
    parts = [_segment_logits(g, values, q.mapped, len(stream.segments) == 1) for values in stream.segments]
    if stream.residual is not None and q.residual is not None:
        parts.append(_segment_logits(g, stream.residual, q.residual, True))
    total = g.sum(parts)
    if stream.norms is not None:
        total = g.op("Mul", total, stream.norms)
    if q.offset is not None:
        total = g.op("Add", total, q.offset)
    return _with_exact_logits(g, stream, q.raw, total)


def _with_exact_logits(g: Emitter, stream: StreamValues, q: ir.Value, total: ir.Value) -> ir.Value:
    if stream.exact is None or stream.chosen is None or stream.kept is None:
        return total
    exact = g.op("MatMul", g.op("MatMul", q, g.swap_last(stream.exact, 4)), stream.chosen)
    return g.op("Add", drop_kept(g, total, stream.kept), exact)


def _segment_logits(g: Emitter, values: SegmentValues, q: ir.Value, whole: bool) -> ir.Value:
    segment, start = values.segment, values.component
    part = q if whole else g.slice(q, start, start + segment.length, 3)
    channel = segment.axis == "channel"
    scaled = g.op("Mul", part, values.scale) if channel and values.scale is not None else part
    mapped, constant = plane_query(g, scaled, values.rules)
    products = [g.op("MatMul", a, g.swap_last(b, 4)) for a, b in zip(mapped, values.planes, strict=True)]
    logits = g.sum(products if constant is None else [*products, constant])
    if values.scale is not None and not channel:
        logits = g.op("Mul", logits, g.swap_last(values.scale, 4))
    if values.minimum is None:
        return logits
    if channel:
        offset = g.reduce("Sum", g.op("Mul", part, values.minimum), 3)
    else:
        offset = g.op("Mul", g.reduce("Sum", part, 3), g.swap_last(values.minimum, 4))
    return g.op("Add", logits, offset)


def stream_values(g: Emitter, stream: StreamValues, weights: ir.Value, maps: StreamMaps) -> ir.Value:
    """Weighted sums ``[N, H, G, D]`` per block for ``weights [N, H, G, B]``, both by KV head."""
    weights = to_slots(g, weights, maps)
    own = weights if stream.kept is None else drop_kept(g, weights, stream.kept)
    scaled = own if stream.norms is None else g.op("Mul", own, stream.norms)
    total = g.concat([_segment_sums(g, values, scaled) for values in stream.segments], 3)
    if maps.map is not None:
        total = g.op("MatMul", total, g.swap_last(maps.map, 3))
    if stream.residual is not None:
        residual = _segment_sums(g, stream.residual, scaled)
        if maps.residual_map is not None:
            residual = g.op("MatMul", residual, g.swap_last(maps.residual_map, 3))
        total = g.op("Add", total, residual)
    if maps.offset is not None:
        total = g.op("Add", total, g.op("Mul", g.reduce("Sum", own, 3), maps.offset))
    if stream.exact is not None and stream.chosen is not None:
        exact = g.op("MatMul", g.op("MatMul", weights, g.swap_last(stream.chosen, 4)), stream.exact)
        total = g.op("Add", total, exact)
    return to_heads(g, total, maps)


def _segment_sums(g: Emitter, values: SegmentValues, weights: ir.Value) -> ir.Value:
    segment, channel = values.segment, values.segment.axis == "channel"
    scaled = weights
    if values.scale is not None and not channel:
        scaled = g.op("Mul", weights, g.swap_last(values.scale, 4))
    sums = [g.op("MatMul", scaled, plane) for plane in values.planes]
    rules = values.rules
    total = g.reduce("Sum", scaled, 3) if rules[-1].offset else None
    codes = codes_of_planes(g, sums, total, rules, segment.length)
    if channel and values.scale is not None:
        codes = g.op("Mul", codes, values.scale)
    if values.minimum is None:
        return codes
    if channel:
        return g.op("Add", codes, g.op("Mul", g.reduce("Sum", weights, 3), values.minimum))
    return g.op("Add", codes, g.reduce("Sum", g.op("Mul", weights, g.swap_last(values.minimum, 4)), 3))
