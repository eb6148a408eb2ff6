"""Blocks of a compressed stream in standard ONNX operators: gathered by id, codes unpacked into planes.

Axes: N blocks, H KV heads (slots of the stream), B tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from minicache_trt.compression.segment import DROPPED, MODEL, Segment
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import StreamLayout
from minicache_trt.functions.planes import PlaneRule, codes_of_planes, plane_rules, planes
from minicache_trt.functions.tape import Emitter


def block_slices(g: Emitter, pool: ir.Value, blocks: ir.Value, place: int) -> ir.Value:
    """``pool[blocks, place]``: one slice per block, contiguous in memory. ``blocks`` is int64 ``[N]``."""
    entries = g.unsqueeze(blocks, -1)
    fixed = g.op("Add", g.op("Mul", entries, g.constant(0)), g.constant(place))
    return g.op("GatherND", pool, g.op("Concat", entries, fixed, attrs={"axis": -1}))


@dataclass(frozen=True)
class SegmentValues:
    """One segment of some blocks.

    ``planes``: float32 ``[N, H, B, ...]``, see `minicache_trt.functions.planes`. ``scale`` and ``minimum`` broadcast
    against ``[N, H, B, length]``; None where the format has none. ``component``: first stored component. ``rules``: how
    codes follow from the planes.
    """

    segment: Segment
    component: int
    planes: list[ir.Value]
    rules: tuple[PlaneRule, ...]
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


def load_stream(
    g: Emitter,
    layout: StreamLayout,
    member: int,
    pools: dict[str, ir.Value],
    blocks: ir.Value,
    lookup: bool = False,
) -> StreamValues:
    """Gather ``blocks`` ``[N]`` for the group's layer number ``member``.

    ``lookup``: see `planes`; ``blocks`` are int32 then, else int64.
    """

    def slices(kind: str, place: int) -> ir.Value:
        return block_slices(g, pools[kind], g.int64(blocks) if lookup else blocks, place)

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
        stored = _run(g, data[kind], part.storage, size, layout.pools[kind].shape[-1], lookup)
        offsets = (part.scale, part.minimum, part.ranges)
        segments.append(_segment_values(g, part.segment, component, stored, params, offsets, lookup))
        component += part.segment.length
    residual = None
    if layout.residual is not None:
        stored = slices("residual", member)
        ranges = g.float32(slices("residual_params", member))
        residual = _segment_values(g, layout.residual, 0, stored, ranges, (0, BLOCK_SIZE, BLOCK_SIZE), lookup)
    norms = None
    if "norms" in pools:
        place = 0 if layout.stream.gaussian else member
        norms = g.unsqueeze(g.float32(slices("norms", place)), 2)
    if "exact" not in pools:
        return StreamValues(tuple(segments), residual, norms, None, None, None)
    index = g.unsqueeze(g.int64(whole("retained_index")), 3)
    chosen = g.float32(g.op("Equal", index, g.constant(list(range(BLOCK_SIZE)))))
    params = g.float32(slices("exact_params", member)) if "exact_params" in pools else None
    retained = layout.stream.retained
    exact = _segment_values(g, layout.exact, 0, slices("exact", member), params, (0, retained, retained), lookup)
    return StreamValues(tuple(segments), residual, norms, chosen, g.reduce("Max", chosen, 2), numbers(g, exact))


def _segment_values(
    g: Emitter,
    segment: Segment,
    component: int,
    stored: ir.Value,
    params: ir.Value | None,
    offsets: tuple[int, int, int],
    lookup: bool,
) -> SegmentValues:
    """``params [N, H, numbers]`` float32; ``offsets``: of scales and minima in it, and how many of each."""
    scale = minimum = None
    if segment.has_ranges and params is not None:
        axis, (start, second, count) = 3 if segment.axis == "token" else 2, offsets
        run = g.pick if lookup else g.slice
        scale = g.unsqueeze(run(params, start, start + count, 2), axis)
        if segment.has_minimum:
            minimum = g.unsqueeze(run(params, second, second + count, 2), axis)
    rules = plane_rules(segment, lookup)
    return SegmentValues(segment, component, planes(g, stored, segment, lookup), rules, scale, minimum)


def _run(g: Emitter, x: ir.Value, start: int, length: int, total: int, lookup: bool) -> ir.Value:
    if length == total:
        return x
    return (g.pick if lookup else g.slice)(x, start, start + length, 3)


def numbers(g: Emitter, values: SegmentValues) -> ir.Value:
    """Dequantized numbers ``[N, H, B, length]``."""
    x = codes_of_planes(g, values.planes, None, values.rules, values.segment.length)
    if values.scale is not None:
        x = g.op("Mul", x, values.scale)
    return x if values.minimum is None else g.op("Add", x, values.minimum)
