"""What every layer's attention needs of a step that is one batch of chunks, computed once.

Every sequence is a chunk of up to Q tokens, Q the width of ``prefill_rows``; 1 where there are none, in a step of
decodes.
Its tokens before this step are its history, in both tiers.
"""

from __future__ import annotations

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.functions.step import MASKED, arange, step_inputs
from minicache_trt.functions.stream_restoring import block_rotation
from minicache_trt.functions.tape import Emitter

UNREACHED = 2**31 - 1
"""Position of what is in no sequence: behind every query."""

CHUNK_STEP = ("slots", "rows", "places", "hidden", "full_keys", "full_values")
CHUNK_STEP_COMPRESSED = ("compressed_blocks", "compressed_split")
CHUNK_STEP_ROTATION = ("cos", "sin")


def chunk_step_names(compressed: bool, rotation: bool) -> list[str]:
    """Outputs of `chunk_step`, in order.

    ``slots``: int64 ``[T, 2, H, 4]``, where each new key and value goes in its pool. ``rows``: int32 ``[S, Q]``,
    packed row of each query, some row for padding. ``places``: int32 ``[T]``, where each packed token is in
    ``[S * Q]``. ``hidden``: float32 ``[S, 1, Q * G, C]``, 0 where a query sees a key, else hugely negative.
    ``full_keys``, ``full_values``: int64 ``[S, Mf, 2]``, block and which half of it. ``compressed_blocks``: int32
    ``[S * Mc]``; ``compressed_split``: int64 ``S, Mc, H, B, D``, the shape that splits what they gather by sequence.
    ``cos``, ``sin``: float32 ``[S * Mc, B, D / 2]``, rotation of the compressed tier's positions.
    """
    return [*CHUNK_STEP, *(CHUNK_STEP_COMPRESSED if compressed else ()), *(CHUNK_STEP_ROTATION if rotation else ())]


def chunk_step_function(name: str, config: ModelConfig, compressed: bool, rotation: bool) -> ir.Function:
    """`chunk_step` as a function of the step's inputs."""
    g = Emitter("cs")
    parameters = {parameter: g.parameter(parameter) for parameter in step_inputs(compressed)}
    inputs = {key: g.int64(value) for key, value in parameters.items()}
    return g.function(name, list(parameters.values()), list(chunk_step(g, config, inputs, rotation).values()))


def chunk_step(g: Emitter, config: ModelConfig, inputs: dict[str, ir.Value], rotation: bool) -> dict[str, ir.Value]:
    """Values by `chunk_step_names`; ``inputs``: the step's, int64; ``rotation``: whether some keys lie un-rotated."""
    compressed = "compressed_table" in inputs
    chunks, tokens = g.extent(inputs["context_len"], 0), g.extent(inputs["slot_mapping"], 0)
    width = g.op("Max", g.extent(inputs["prefill_rows"], 1), g.constant([1]))
    starts, ends = _bounds(g, inputs["query_start"], chunks)
    start, end = g.unsqueeze(starts, 1), g.unsqueeze(ends, 1)
    rows = g.op("Add", start, g.unsqueeze(arange(g, width), 0))
    token = arange(g, tokens)
    ended = g.op("GreaterOrEqual", g.unsqueeze(token, 1), g.unsqueeze(ends, 0))
    sequence = g.reduce("Sum", g.int64(ended), 1, keep=False)
    offset = g.op("Sub", token, g.op("Gather", starts, sequence, attrs={"axis": 0}))
    group = g.constant([config.group_size])
    inside = g.op("Div", arange(g, g.op("Mul", width, group)), group)
    first = g.op("Sub", g.unsqueeze(inputs["context_len"], 1), g.op("Sub", end, start))
    result = {
        "slots": _slots(g, config.num_kv_heads, inputs["slot_mapping"]),
        "rows": g.int32(g.op("Min", rows, g.op("Sub", tokens, g.constant([1])))),
        "places": g.int32(g.op("Add", g.op("Mul", sequence, width), offset)),
        "hidden": _hidden(g, config, g.op("Add", first, g.unsqueeze(inside, 0)), _positions(g, inputs)),
    }
    block = g.unsqueeze(inputs["full_table"], 2)
    zero = g.op("Mul", block, g.constant(0))
    for place, name in enumerate(("full_keys", "full_values")):
        result[name] = g.concat([block, g.op("Add", zero, g.constant(place))], 2)
    if compressed:
        table = inputs["compressed_table"]
        sizes = g.constant([config.num_kv_heads, BLOCK_SIZE, config.head_dim])
        result["compressed_blocks"] = g.int32(g.op("Reshape", table, g.constant([-1])))
        result["compressed_split"] = g.op("Concat", g.op("Shape", table), sizes, attrs={"axis": 0})
    if rotation:
        table = inputs["compressed_table"]
        columns = g.op("Mul", table, g.constant(0))
        columns = g.op("Add", columns, arange(g, g.extent(table, 1)))
        angles = block_rotation(g, config, g.op("Reshape", columns, g.constant([-1])))
        result["cos"], result["sin"] = (g.op("Squeeze", x, g.constant([1])) for x in (angles.cos, angles.sin))
    return {key: result[key] for key in chunk_step_names(compressed, rotation)}


def _bounds(g: Emitter, query_start: ir.Value, chunks: ir.Value) -> tuple[ir.Value, ir.Value]:
    """First row of each sequence and of the one after it, ``[S]``."""
    index = arange(g, chunks)
    following = g.op("Add", index, g.constant(1))
    start, end = (g.op("Gather", query_start, places, attrs={"axis": 0}) for places in (index, following))
    return start, end


def _slots(g: Emitter, heads: int, slot_mapping: ir.Value) -> ir.Value:
    slot = g.unsqueeze(slot_mapping, 1, 2, 3)
    size = g.constant(BLOCK_SIZE)
    block, offset = g.op("Div", slot, size), g.op("Mod", slot, size)
    zero = g.op("Mul", offset, g.constant(0))
    place = g.concat([block, zero, zero, offset], 3)
    return g.op("Add", place, g.constant([[[[0, part, head, 0] for head in range(heads)] for part in range(2)]]))


def _positions(g: Emitter, inputs: dict[str, ir.Value]) -> ir.Value:
    """Position of every entry of both tiers, compressed first: ``[S, C]``."""

    def entries(name: str) -> ir.Value:
        return g.unsqueeze(arange(g, g.op("Mul", g.extent(inputs[name], 1), g.constant([BLOCK_SIZE]))), 0)

    if "compressed_table" not in inputs:
        zero = g.op("Mul", g.unsqueeze(inputs["context_len"], 1), g.constant(0))
        return g.op("Add", entries("full_table"), zero)
    compressed, history = g.unsqueeze(inputs["compressed_len"], 1), entries("compressed_table")
    history = g.op("Where", g.op("Less", history, compressed), history, g.constant(UNREACHED))
    return g.concat([history, g.op("Add", entries("full_table"), compressed)], 1)


def _hidden(g: Emitter, config: ModelConfig, at: ir.Value, position: ir.Value) -> ir.Value:
    """``[S, 1, Q * G, C]`` for queries at positions ``at [S, Q * G]``."""
    ahead = g.op("Sub", g.unsqueeze(at, 1, 3), g.unsqueeze(position, 1, 2))
    seen = g.op("GreaterOrEqual", ahead, g.constant(0))
    if config.sliding_window is not None:
        seen = g.op("And", seen, g.op("Less", ahead, g.constant(config.sliding_window)))
    return g.op("Where", seen, g.floats(0.0), g.floats(MASKED))
