"""Reading blocks of a compressed stream in standard ONNX operators: gathered by id, used without restoring them.

For a stream with dequantized latent vectors ``y = scale * code + minimum`` and norms ``nu``, the products attention
needs are linear in the codes, so maps, scales, minima and norms are applied to queries, logits and weights::

    logits:  nu_t (q P . y_t) + q . c          values:  (sum_t p_t nu_t y_t) P^T + c sum_t p_t

Axes: N blocks, H KV heads (slots of the stream unless said otherwise), G query heads of a KV head, B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from minicache_trt.compression.segment import DROPPED, MODEL, Segment
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout
from minicache_trt.functions.planes import codes_of_planes, plane_query, plane_rules, planes
from minicache_trt.functions.stream_maps import StreamMaps
from minicache_trt.functions.tape import Emitter
from minicache_trt.model.rope import inverse_frequencies


def block_slices(g: Emitter, pool: ir.Value, blocks: ir.Value, place: int) -> ir.Value:
    """``pool[blocks, place]``: one slice per block, contiguous in memory. ``blocks`` is int64 ``[N]``."""
    entries = g.unsqueeze(blocks, -1)
    fixed = g.op("Add", g.op("Mul", entries, g.constant(0)), g.constant(place))
    return g.op("GatherND", pool, g.op("Concat", entries, fixed, attrs={"axis": -1}))


@dataclass(frozen=True)
class SegmentValues:
    """One segment of some blocks.

    ``planes``: float32 ``[N, H, B, ...]``, see `minicache_trt.functions.planes`. ``scale`` and ``minimum`` broadcast
    against ``[N, H, B, length]``; None where the format has none. ``component``: first stored component.
    """

    segment: Segment
    component: int
    planes: list[ir.Value]
    scale: ir.Value | None
    minimum: ir.Value | None


@dataclass(frozen=True)
class StreamValues:
    """Some blocks of a stream, for one layer.

    ``norms [N, Hn, 1, B]``; ``chosen [N, Hn, R, B]`` 1.0 where a retained slot holds that token;
    ``kept [N, Hn, 1, B]`` 1.0 where any does; ``exact [N, H, R, D]``.
    """

    segments: tuple[SegmentValues, ...]
    residual: SegmentValues | None
    norms: ir.Value | None
    chosen: ir.Value | None
    kept: ir.Value | None
    exact: ir.Value | None


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


def load_stream(
    g: Emitter, layout: StreamLayout, member: int, pools: dict[str, ir.Value], blocks: ir.Value
) -> StreamValues:
    """Gather ``blocks`` (int64 ``[N]``) for the group's layer number ``member``."""

    def whole(kind: str) -> ir.Value:
        return g.op("Gather", pools[kind], blocks, attrs={"axis": 0})

    data = {kind: whole(kind) for kind in ("latent", "codes") if kind in pools}
    params = g.float32(whole("params")) if "params" in pools else None
    segments = []
    component = 0
    for part in layout.segments:
        if part.segment.kind == DROPPED:
            continue
        kind: Literal["latent", "codes"] = "latent" if part.segment.kind == MODEL else "codes"
        size = part.segment.length if kind == "latent" else part.segment.code_bytes
        stored = _run(g, data[kind], part.storage, size, layout.pools[kind].shape[-1])
        offsets = (part.scale, part.minimum, part.ranges)
        segments.append(_segment_values(g, part.segment, component, stored, params, offsets))
        component += part.segment.length
    residual = None
    if layout.residual is not None:
        stored = block_slices(g, pools["residual"], blocks, member)
        ranges = g.float32(block_slices(g, pools["residual_params"], blocks, member))
        residual = _segment_values(g, layout.residual, 0, stored, ranges, (0, BLOCK_SIZE, BLOCK_SIZE))
    norms = None
    if "norms" in pools:
        place = 0 if layout.stream.gaussian else member
        norms = g.unsqueeze(g.float32(block_slices(g, pools["norms"], blocks, place)), 2)
    if "exact" not in pools:
        return StreamValues(tuple(segments), residual, norms, None, None, None)
    index = g.unsqueeze(g.int64(whole("retained_index")), 3)
    chosen = g.float32(g.op("Equal", index, g.constant(list(range(BLOCK_SIZE)))))
    exact = _exact(g, layout, member, pools, blocks)
    return StreamValues(tuple(segments), residual, norms, chosen, g.reduce("Max", chosen, 2), exact)


def _exact(g: Emitter, layout: StreamLayout, member: int, pools: dict[str, ir.Value], blocks: ir.Value) -> ir.Value:
    """Retained vectors ``[N, H, R, D]``."""
    stored, retained = block_slices(g, pools["exact"], blocks, member), layout.stream.retained
    params = None
    if "exact_params" in pools:
        params = g.float32(block_slices(g, pools["exact_params"], blocks, member))
    values = _segment_values(g, layout.exact, 0, stored, params, (0, retained, retained))
    return _numbers(g, values)


def _segment_values(
    g: Emitter,
    segment: Segment,
    component: int,
    stored: ir.Value,
    params: ir.Value | None,
    offsets: tuple[int, int, int],
) -> SegmentValues:
    """``params [N, H, numbers]`` float32; ``offsets``: of scales and minima in it, and how many of each."""
    scale = minimum = None
    if segment.has_ranges and params is not None:
        axis, (start, second, count) = 3 if segment.axis == "token" else 2, offsets
        scale = g.unsqueeze(g.slice(params, start, start + count, 2), axis)
        if segment.has_minimum:
            minimum = g.unsqueeze(g.slice(params, second, second + count, 2), axis)
    return SegmentValues(segment, component, planes(g, stored, segment), scale, minimum)


def _run(g: Emitter, x: ir.Value, start: int, length: int, total: int) -> ir.Value:
    return x if length == total else g.slice(x, start, start + length, 3)


def _drop_kept(g: Emitter, x: ir.Value, kept: ir.Value) -> ir.Value:
    return g.op("Mul", x, g.op("Sub", g.floats(1.0), kept))


def _sum(g: Emitter, parts: list[ir.Value]) -> ir.Value:
    total = parts[0]
    for part in parts[1:]:
        total = g.op("Add", total, part)
    return total


def stream_logits(g: Emitter, stream: StreamValues, q: StreamQuery) -> ir.Value:
    """Logits ``[N, H, G, B]`` of queries over the stream's keys, retained tokens from their exact ones."""
    parts = [_segment_logits(g, values, q.mapped, len(stream.segments) == 1) for values in stream.segments]
    if stream.residual is not None and q.residual is not None:
        parts.append(_segment_logits(g, stream.residual, q.residual, True))
    total = _sum(g, parts)
    if stream.norms is not None:
        total = g.op("Mul", total, stream.norms)
    if q.offset is not None:
        total = g.op("Add", total, q.offset)
    return _with_exact_logits(g, stream, q.raw, total)


def _with_exact_logits(g: Emitter, stream: StreamValues, q: ir.Value, total: ir.Value) -> ir.Value:
    if stream.exact is None or stream.chosen is None or stream.kept is None:
        return total
    exact = g.op("MatMul", g.op("MatMul", q, g.swap_last(stream.exact, 4)), stream.chosen)
    return g.op("Add", _drop_kept(g, total, stream.kept), exact)


def _segment_logits(g: Emitter, values: SegmentValues, q: ir.Value, whole: bool) -> ir.Value:
    segment, start = values.segment, values.component
    part = q if whole else g.slice(q, start, start + segment.length, 3)
    channel = segment.axis == "channel"
    scaled = g.op("Mul", part, values.scale) if channel and values.scale is not None else part
    mapped, constant = plane_query(g, scaled, plane_rules(segment))
    products = [g.op("MatMul", a, g.swap_last(b, 4)) for a, b in zip(mapped, values.planes, strict=True)]
    logits = _sum(g, products if constant is None else [*products, constant])
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
    own = weights if stream.kept is None else _drop_kept(g, weights, stream.kept)
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
    rules = plane_rules(segment)
    total = g.reduce("Sum", scaled, 3) if rules[-1].offset else None
    codes = codes_of_planes(g, sums, total, rules, segment.length)
    if channel and values.scale is not None:
        codes = g.op("Mul", codes, values.scale)
    if values.minimum is None:
        return codes
    if channel:
        return g.op("Add", codes, g.op("Mul", g.reduce("Sum", weights, 3), values.minimum))
    return g.op("Add", codes, g.reduce("Sum", g.op("Mul", weights, g.swap_last(values.minimum, 4)), 3))


def _numbers(g: Emitter, values: SegmentValues) -> ir.Value:
    """Dequantized numbers ``[N, H, B, length]``."""
    x = codes_of_planes(g, values.planes, None, plane_rules(values.segment), values.segment.length)
    if values.scale is not None:
        x = g.op("Mul", x, values.scale)
    return x if values.minimum is None else g.op("Add", x, values.minimum)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every token's position, ``[N, 1, B, D / 2]``."""

    cos: ir.Value
    sin: ir.Value

    def apply(self, g: Emitter, x: ir.Value, dim: int, inverse: bool = False) -> ir.Value:
        """Rotate ``x [N, H, B, D]``, halves paired, by its positions or (``inverse``) back."""
        first, second = g.slice(x, 0, dim // 2, 3), g.slice(x, dim // 2, dim, 3)
        left, right = ("Add", "Sub") if inverse else ("Sub", "Add")

        def both(kind: str, a: ir.Value, b: ir.Value) -> ir.Value:
            return g.op(kind, g.op("Mul", a, self.cos), g.op("Mul", b, self.sin))

        return g.concat([both(left, first, second), both(right, second, first)], 3)


def block_rotation(g: Emitter, config: ModelConfig, number: ir.Value) -> Rotation:
    """Rotation of every token of blocks with these numbers (int64 ``[N]``) within their sequence."""
    first = g.op("Mul", g.unsqueeze(number, 1), g.constant(BLOCK_SIZE))
    position = g.float32(g.op("Add", first, g.constant(list(range(BLOCK_SIZE)))))
    angle = g.op(
        "Mul", g.unsqueeze(position, 1, 3), g.floats(inverse_frequencies(config.rope, config.head_dim).numpy())
    )
    return Rotation(g.op("Cos", angle), g.op("Sin", angle))


def restore_stream(
    g: Emitter, layout: StreamLayout, stream: StreamValues, maps: StreamMaps, rotation: Rotation | None
) -> ir.Value:
    """Restored keys or values ``[N, H, B, D]`` by slot, retained tokens exact.

    ``rotation`` is that of the blocks' positions, for keys in the pre_rope basis.
    """
    x = g.concat([_numbers(g, values) for values in stream.segments], 3)
    if maps.map is not None:
        x = g.op("MatMul", x, g.swap_last(maps.map, 3))
    if stream.residual is not None:
        residual = _numbers(g, stream.residual)
        if maps.residual_map is not None:
            residual = g.op("MatMul", residual, g.swap_last(maps.residual_map, 3))
        x = g.op("Add", x, residual)
    if stream.norms is not None:
        x = g.op("Mul", x, g.swap_last(stream.norms, 4))
    if maps.offset is not None:
        x = g.op("Add", x, maps.offset)
    if layout.stream.basis == "pre_rope":
        assert rotation is not None
        x = rotation.apply(g, x, layout.config.head_dim)
    if stream.exact is not None and stream.chosen is not None and stream.kept is not None:
        exact = g.op("MatMul", g.swap_last(stream.chosen, 4), stream.exact)
        x = g.op("Add", _drop_kept(g, x, g.swap_last(stream.kept, 4)), exact)
    return x
