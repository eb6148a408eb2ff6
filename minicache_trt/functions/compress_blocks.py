"""`CompressBlocks` as an ONNX model-local function: full-tier blocks into one stream's compressed pools.

kv.<l> ──gather source blocks──► merge ──► retention ──► quantize, pack ──scatter to target blocks──► pools
"""

from __future__ import annotations

import onnx_ir as ir

from minicache_trt.compression.constants import FIRST_SCORE
from minicache_trt.compression.segment import DROPPED, GAUSSIAN, MODEL
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import COMPRESSOR_INPUTS, StreamLayout
from minicache_trt.functions.merges import Merged, merge_group
from minicache_trt.functions.quantizers import float16, quantize_gaussian, quantize_ranges
from minicache_trt.functions.stream_loading import block_slices
from minicache_trt.functions.stream_restoring import Rotation, block_rotation
from minicache_trt.functions.tape import Emitter

BEFORE_ALL = 256 * FIRST_SCORE
"""Score of the first sink: above every token's, and so are those of the sinks after it."""
NEVER = -2 * BEFORE_ALL
"""Score of tokens a threshold rule does not keep."""


def compress_blocks(name: str, layout: StreamLayout, maps: tuple[str, ...] = (), count: int = 1) -> ir.Function:
    """Build the function for one stream layout.

    Parameters
    ----------
    name : str
    layout : StreamLayout
    maps : tuple of str
        Names of the linear maps it takes, as `minicache_trt.model.maps.writer_maps` gives them.
    count : int
        Streams of this layout it compresses at once, side by side along the axis of blocks; one if it takes maps.

    Returns
    -------
    ir.Function
        Inputs ``source_blocks, target_blocks, block_index [N]`` int32, the full pools of the group's layers, the maps,
        then the stream's own pools, each stream's behind the one's before it; outputs those pools after the update.
    """
    g = Emitter("cb")
    stream = layout.stream
    suffixes = [f".{number}" for number in range(count)] if count > 1 else [""]
    parameters = {key: g.parameter(key) for key in COMPRESSOR_INPUTS}
    layers = [[g.parameter(f"kv{member}{suffix}") for member in range(len(stream.layers))] for suffix in suffixes]
    constants = {key: g.parameter(key) for key in maps}
    pools = [{kind: g.parameter(f"{kind}{suffix}") for kind in layout.pools} for suffix in suffixes]
    source, index = g.int64(parameters["source_blocks"]), g.int64(parameters["block_index"])
    place = PARTS.index(stream.part)
    raw = [g.concat([block_slices(g, kv, source, place) for kv in same], 0) for same in zip(*layers, strict=True)]
    if "heads" in constants:
        rows = [g.op("Gather", constants["heads"], g.constant(i), attrs={"axis": 0}) for i in range(len(raw))]
        raw = [g.op("Gather", x, heads, attrs={"axis": 1}) for x, heads in zip(raw, rows, strict=True)]
    fields = _fields(g, layout, raw, g.concat([index] * count, 0), constants)
    target = g.unsqueeze(g.int64(parameters["target_blocks"]), 1)
    updates = {kind: _split(g, fields[kind], layout.pools[kind].shape, count) for kind in layout.pools}
    outputs = [
        g.op("ScatterND", own[kind], target, updates[kind][number])
        for number, own in enumerate(pools)
        for kind in layout.pools
    ]
    inputs = [*parameters.values(), *(kv for own in layers for kv in own), *constants.values()]
    inputs += [pool for own in pools for pool in own.values()]
    return g.function(name, inputs, outputs)


def _split(g: Emitter, field: ir.Value, shape: tuple[int, ...], count: int) -> list[ir.Value]:
    """``[count * N, *shape]`` as ``count`` of ``[N, *shape]``; by Gather, since a Split is many layers in TensorRT."""
    if count == 1:
        return [field]
    parts = g.reshape(field, [count, -1, *shape])
    return [g.op("Gather", parts, g.constant(number), attrs={"axis": 0}) for number in range(count)]


def _fields(
    g: Emitter, layout: StreamLayout, raw: list[ir.Value], block_index: ir.Value, maps: dict[str, ir.Value]
) -> dict[str, ir.Value]:
    """The stream's fields for ``raw``, the group's layers ``[N, H, B, D]`` in compute type, by slot."""
    stream = layout.stream
    fields: dict[str, ir.Value] = {}
    x = [g.float32(layer) for layer in raw]
    if stream.basis == "pre_rope":
        rotation: Rotation = block_rotation(g, layout.config, block_index)
        x = [rotation.apply(g, layer, layout.config.head_dim, inverse=True) for layer in x]
    merged = merge_group(g, layout, x, maps)
    retained = None
    if stream.retained:
        assert merged.score is not None
        chosen, index = _retain(g, stream, merged.score, block_index)
        retained = g.reduce("Max", chosen, 2, keep=False)
        fields["retained_index"] = g.cast(index, ir.DataType.INT8)
        exact = [g.op("MatMul", chosen, g.float32(layer)) for layer in raw]
        fields |= _exact(g, layout, exact, raw[0])
    if merged.norms:
        fields["norms"] = float16(g, _stack(g, merged.norms))
    if merged.residuals:
        fields |= _members(g, layout, "residual", merged.residuals)
    return fields | _segments(g, layout, merged, retained, raw[0])


def _stack(g: Emitter, parts: list[ir.Value]) -> ir.Value:
    """``[N, ...]`` of each layer as ``[N, m, ...]``."""
    return g.concat([g.unsqueeze(part, 1) for part in parts], 1)


def _exact(g: Emitter, layout: StreamLayout, vectors: list[ir.Value], like: ir.Value) -> dict[str, ir.Value]:
    """Retained vectors ``[N, H, R, D]`` of each layer; slots that hold none are zero. ``like``: of compute type."""
    if layout.exact.kind == MODEL:
        return {"exact": g.op("CastLike", _stack(g, vectors), like)}
    return _members(g, layout, "exact", vectors)


def _members(g: Emitter, layout: StreamLayout, kind: str, vectors: list[ir.Value]) -> dict[str, ir.Value]:
    """Each layer's vectors ``[N, H, x, D]`` quantized with a range per vector: pools ``kind`` and its params."""
    segment = layout.exact if kind == "exact" else layout.residual
    assert segment is not None
    parts = [quantize_ranges(g, segment, x, None, layout.config.num_kv_heads) for x in vectors]
    return {
        kind: _stack(g, [part.codes for part in parts]),
        f"{kind}_params": _stack(g, [g.concat(part.params, 2) for part in parts]),
    }


def _segments(
    g: Emitter, layout: StreamLayout, merged: Merged, retained: ir.Value | None, like: ir.Value
) -> dict[str, ir.Value]:
    """Pools latent, codes and params, and norms of gaussian segments."""
    stream, latent = layout.stream, merged.latent
    fields: dict[str, ir.Value] = {}
    runs: dict[str, list[ir.Value]] = {"latent": [], "codes": [], "params": []}
    if stream.gaussian:
        latent, fields["norms"] = _normalised(g, latent)
    stored = [part.segment for part in layout.segments if part.segment.kind != DROPPED]
    start = 0
    for segment in stored:
        y = latent if len(stored) == 1 else g.slice(latent, start, start + segment.length, 3)
        start += segment.length
        if segment.kind == MODEL:
            runs["latent"].append(g.op("CastLike", y, like))
            continue
        if segment.kind == GAUSSIAN:
            quantized = quantize_gaussian(g, segment, y, layout.config.num_kv_heads)
        else:
            quantized = quantize_ranges(g, segment, y, retained, layout.config.num_kv_heads)
        runs["codes"].append(quantized.codes)
        runs["params"] += quantized.params
    for kind, parts in runs.items():
        if parts:
            fields[kind] = g.concat(parts, 2 if kind == "params" else 3)
    return fields


def _normalised(g: Emitter, z: ir.Value) -> tuple[ir.Value, ir.Value]:
    """``z / nu`` and nu, its root mean square, as float16 ``[N, 1, H, B]``; zero where nu is."""
    norm = float16(g, g.op("Sqrt", g.reduce("Mean", g.op("Mul", z, z), 3)))
    wide = g.float32(norm)
    positive = g.op("Greater", wide, g.floats(0.0))
    unit = g.op("Div", z, g.op("Where", positive, wide, g.floats(1.0)))
    # The lowest code, whatever z is: far below every boundary.
    unit = g.op("Where", positive, unit, g.floats(-FIRST_SCORE * BLOCK_SIZE))
    return unit, g.unsqueeze(g.op("Squeeze", norm, g.constant([3])), 1)


def _retain(g: Emitter, stream: Stream, score: ir.Value, block_index: ir.Value) -> tuple[ir.Value, ir.Value]:
    """One-hot rows ``[N, Hn, R, B]`` float32 and offsets ``[N, Hn, R]`` (float32, ascending, then -1)."""
    if stream.retention != "topk":
        score = _thresholded(g, stream, score)
    if stream.sink_tokens:
        first = g.unsqueeze(g.op("Equal", block_index, g.constant(0)), 1, 2)
        sinks = g.constant([i < stream.sink_tokens for i in range(BLOCK_SIZE)], "bool")
        places = g.floats([BEFORE_ALL - i for i in range(BLOCK_SIZE)])
        score = g.op("Where", g.op("And", first, sinks), places, score)
    count = g.constant([stream.retained])
    values, best = g.op_multi("TopK", score, count, outputs=2, attrs={"axis": -1, "largest": 1, "sorted": 1})
    place = g.float32(best)
    if stream.retention != "topk":
        place = g.op("Where", g.op("Greater", values, g.floats(NEVER)), place, g.floats(float(BLOCK_SIZE)))
    index, _ = g.op_multi("TopK", place, count, outputs=2, attrs={"axis": -1, "largest": 0, "sorted": 1})
    offsets = g.floats([float(i) for i in range(BLOCK_SIZE)])
    chosen = g.float32(g.op("Equal", g.unsqueeze(index, 3), offsets))
    if stream.retention != "topk":
        index = g.op("Where", g.op("Less", index, g.floats(float(BLOCK_SIZE))), index, g.floats(-1.0))
    return chosen, index


def _thresholded(g: Emitter, stream: Stream, score: ir.Value) -> ir.Value:
    """Larger first among the tokens a threshold rule keeps, `NEVER` for the others; ``score [N, Hn, B]``."""
    # Relative errors are always meaningful; angles are where they are below the score of those that are not.
    limit = 2 * FIRST_SCORE if stream.merge == "linear" else FIRST_SCORE
    meaningful = g.op("Less", score, g.floats(limit))
    highest = g.reduce("Max", g.op("Where", meaningful, score, g.floats(-FIRST_SCORE)), 2)
    lowest = g.reduce("Min", g.op("Where", meaningful, score, g.floats(2 * FIRST_SCORE)), 2)
    margin = g.op("Mul", g.op("Sub", highest, lowest), g.floats(stream.gamma))
    if stream.retention == "threshold":
        kept = g.op("Or", g.op("Greater", score, g.op("Sub", highest, margin)), g.op("Not", meaningful))
        return g.op("Where", kept, score, g.floats(NEVER))
    kept = g.op("And", g.op("Less", score, g.op("Add", lowest, margin)), meaningful)
    return g.op("Where", kept, g.op("Neg", score), g.floats(NEVER))
