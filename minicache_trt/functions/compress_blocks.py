"""`CompressBlocks` as an ONNX model-local function: full-tier blocks into one stream's compressed pools.

kv.<l> ──gather source blocks──► merge ──► retention ──► quantize, pack ──scatter to target blocks──► pools
"""

from __future__ import annotations

import math

import onnx_ir as ir

from minicache_trt.compression.constants import ANTIPODAL_MARGIN, FIRST_SCORE, FLOAT16_MAX, SMALL_ANGLE
from minicache_trt.compression.segment import MODEL, Segment
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import BYTE_OFFSET, COMPRESSOR_INPUTS, StreamLayout
from minicache_trt.functions.streams import block_slices
from minicache_trt.functions.tape import Emitter

EVERY_ANGLE_ABOVE = 2 * FIRST_SCORE


def compress_blocks(name: str, config: ModelConfig, layout: StreamLayout) -> ir.Function:
    """Build the function for one stream layout.

    Returns
    -------
    ir.Function
        Inputs ``source_blocks, target_blocks, block_index [N]`` int32, the full pools of the group's layers, then the
        stream's own pools; outputs those pools after the update.
    """
    g = Emitter("cb")
    stream = layout.stream
    parameters = {key: g.parameter(key) for key in COMPRESSOR_INPUTS}
    layers = [g.parameter(f"kv{member}") for member in range(len(stream.layers))]
    pools = {kind: g.parameter(kind) for kind in layout.pools}
    source = g.int64(parameters["source_blocks"])
    raw = [block_slices(g, kv, source, PARTS.index(stream.part)) for kv in layers]
    fields = _fields(g, config, layout, raw, parameters["block_index"])
    target = g.unsqueeze(g.int64(parameters["target_blocks"]), 1)
    outputs = [g.op("ScatterND", pools[kind], target, fields[kind]) for kind in layout.pools]
    return g.function(name, [*parameters.values(), *layers, *pools.values()], outputs)


def _fields(
    g: Emitter, config: ModelConfig, layout: StreamLayout, raw: list[ir.Value], block_index: ir.Value
) -> dict[str, ir.Value]:
    """The stream's fields for ``raw``, the group's layers ``[N, H, B, D]`` in compute type."""
    stream = layout.stream
    fields: dict[str, ir.Value] = {}
    latent, norms, score = _merge(g, config, stream, [g.float32(x) for x in raw])
    retained = None
    if stream.retained:
        assert score is not None
        chosen, index = _retain(g, stream, score, block_index)
        retained = g.reduce("Max", chosen, 2, keep=False)
        fields["retained_index"] = g.cast(index, ir.DataType.INT8)
        exact = [g.unsqueeze(g.op("MatMul", chosen, x), 1) for x in raw]
        fields["exact"] = g.concat(exact, 1)
    if norms:
        fields["norms"] = _float16(g, g.concat([g.unsqueeze(norm, 1) for norm in norms], 1))
    runs: dict[str, list[ir.Value]] = {"latent": [], "codes": [], "params": []}
    for part in layout.segments:
        whole = len(layout.segments) == 1
        y = latent if whole else g.slice(latent, part.component, part.component + part.segment.length, 3)
        if part.segment.kind == MODEL:
            runs["latent"].append(g.op("CastLike", y, raw[0]))
            continue
        codes, scale, minimum = _quantize(g, part.segment, y, retained)
        runs["codes"].append(_pack(g, codes, part.segment, config.num_kv_heads))
        runs["params"] += [scale, minimum]
    for kind, parts in runs.items():
        if parts:
            fields[kind] = g.concat(parts, 2 if kind == "params" else 3)
    return fields


def _merge(
    g: Emitter, config: ModelConfig, stream: Stream, x: list[ir.Value]
) -> tuple[ir.Value, list[ir.Value] | None, ir.Value | None]:
    """Latent ``[N, H, B, D]``, norms ``[N, Hn, B]`` per layer (slerp) and retention score ``[N, Hn, B]``."""
    if stream.merge == "none":
        return x[0], None, None
    heads, dim = config.num_kv_heads, config.head_dim
    vectors = x
    if stream.norm == "token":
        vectors = [g.reshape(g.transpose(v, [0, 2, 1, 3]), [-1, 1, BLOCK_SIZE, heads * dim]) for v in x]
    (norm0, unit0), (norm1, unit1) = (_direction(g, v) for v in vectors)
    cosine = g.op("Clip", g.reduce("Sum", g.op("Mul", unit0, unit1), 3), g.floats(-1.0), g.floats(1.0))
    omega = g.op("Acos", cosine)
    zero = g.op("Or", _is_zero(g, unit0), _is_zero(g, unit1))
    meaningless = g.op("Or", zero, g.op("Greater", omega, g.floats(math.pi - ANTIPODAL_MARGIN)))
    score = g.op("Squeeze", g.op("Where", meaningless, g.floats(FIRST_SCORE), omega), g.constant([3]))
    if stream.merge == "mean":
        return g.op("Mul", g.op("Add", x[0], x[1]), g.floats(0.5)), None, score
    latent = _slerp(g, unit0, unit1, omega, meaningless, stream.t)
    if stream.norm == "token":
        latent = g.transpose(g.reshape(latent, [-1, BLOCK_SIZE, heads, dim]), [0, 2, 1, 3])
    return latent, [g.op("Squeeze", norm, g.constant([3])) for norm in (norm0, norm1)], score


def _direction(g: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    norm = g.op("Sqrt", g.reduce("Sum", g.op("Mul", x, x), 3))
    positive = g.op("Greater", norm, g.floats(0.0))
    safe = g.op("Where", positive, norm, g.floats(1.0))
    return norm, g.op("Where", positive, g.op("Div", x, safe), g.floats(0.0))


def _is_zero(g: Emitter, unit: ir.Value) -> ir.Value:
    return g.op("Equal", g.reduce("Max", g.op("Abs", unit), 3), g.floats(0.0))


def _slerp(g: Emitter, a: ir.Value, b: ir.Value, omega: ir.Value, meaningless: ir.Value, t: float) -> ir.Value:
    def blend(weight_a: ir.Value, weight_b: ir.Value) -> ir.Value:
        return g.op("Add", g.op("Mul", weight_a, a), g.op("Mul", weight_b, b))

    sine = g.op("Sin", omega)
    safe = g.op("Where", g.op("Greater", sine, g.floats(0.0)), sine, g.floats(1.0))
    weights = [g.op("Div", g.op("Sin", g.op("Mul", omega, g.floats(w))), safe) for w in (1.0 - t, t)]
    _, straight = _direction(g, blend(g.floats(1.0 - t), g.floats(t)))
    small = g.op("Less", omega, g.floats(SMALL_ANGLE))
    return g.op("Where", meaningless, b, g.op("Where", small, straight, blend(*weights)))


def _retain(g: Emitter, stream: Stream, score: ir.Value, block_index: ir.Value) -> tuple[ir.Value, ir.Value]:
    """One-hot rows ``[N, Hn, R, B]`` float32 and offsets ``[N, Hn, R]`` (float32, ascending) of the retained tokens."""
    if stream.sink_tokens:
        sinks = g.floats([float(i < stream.sink_tokens) * EVERY_ANGLE_ABOVE for i in range(BLOCK_SIZE)])
        first = g.float32(g.op("Equal", g.int64(block_index), g.constant(0)))
        score = g.op("Add", score, g.op("Mul", g.unsqueeze(first, 1, 2), sinks))
    count = g.constant([stream.retained])
    _, best = g.op_multi("TopK", score, count, outputs=2, attrs={"axis": -1, "largest": 1, "sorted": 1})
    index, _ = g.op_multi("TopK", g.float32(best), count, outputs=2, attrs={"axis": -1, "largest": 0, "sorted": 1})
    offsets = g.floats([float(i) for i in range(BLOCK_SIZE)])
    return g.float32(g.op("Equal", g.unsqueeze(index, 3), offsets)), index


def _float16(g: Emitter, x: ir.Value) -> ir.Value:
    return g.cast(g.op("Clip", x, g.floats(-FLOAT16_MAX), g.floats(FLOAT16_MAX)), ir.DataType.FLOAT16)


def _quantize(
    g: Emitter, segment: Segment, y: ir.Value, retained: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes ``[N, H, B, length]`` (float32), scale and minimum (float16) of one segment; see `compression.quantize`."""
    levels = float(2**segment.bits - 1)
    axis = 3 if segment.axis == "token" else 2
    keep = None
    if segment.axis == "channel" and retained is not None:
        keep = g.op("Equal", g.unsqueeze(retained, 3), g.floats(0.0))

    def bound(kind: str, outside: float) -> ir.Value:
        inside = y if keep is None else g.op("Where", keep, y, g.floats(outside))
        return g.reduce(kind, inside, axis, keep=False)

    low, high = bound("Min", math.inf), bound("Max", -math.inf)
    scale = _float16(g, g.op("Div", g.op("Sub", high, low), g.floats(levels)))
    minimum = _float16(g, low)
    step = g.unsqueeze(g.float32(scale), axis)
    positive = g.op("Greater", step, g.floats(0.0))
    safe = g.op("Where", positive, step, g.floats(1.0))
    ratio = g.op("Div", g.op("Sub", y, g.unsqueeze(g.float32(minimum), axis)), safe)
    codes = g.op("Clip", g.op("Round", ratio), g.floats(0.0), g.floats(levels))
    coded = positive if keep is None else g.op("And", positive, keep)
    return g.op("Where", coded, codes, g.floats(0.0)), scale, minimum


def _pack(g: Emitter, codes: ir.Value, segment: Segment, heads: int) -> ir.Value:
    """int8 ``[N, H, B, bytes]``, low bits first, byte minus `BYTE_OFFSET`."""
    value = codes
    per_byte = 8 // segment.bits
    if per_byte > 1:
        grouped = g.reshape(codes, [-1, heads, BLOCK_SIZE, segment.length // per_byte, per_byte])
        weights = g.floats([float(1 << (segment.bits * i)) for i in range(per_byte)])
        value = g.reduce("Sum", g.op("Mul", grouped, weights), 4, keep=False)
    return g.cast(g.op("Sub", value, g.floats(float(BYTE_OFFSET))), ir.DataType.INT8)
