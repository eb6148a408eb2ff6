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
from minicache_trt.functions.planes import codes_of_planes, plane_rules, planes
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
    return numbers(g, values)


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


def numbers(g: Emitter, values: SegmentValues) -> ir.Value:
    """Dequantized numbers ``[N, H, B, length]``."""
    x = codes_of_planes(g, values.planes, None, plane_rules(values.segment), values.segment.length)
    if values.scale is not None:
        x = g.op("Mul", x, values.scale)
    return x if values.minimum is None else g.op("Add", x, values.minimum)
