"""`PagedAttention` as an ONNX model-local function in standard operators.

    q, k, v, kv ──append──► kv.out ──► full tier ──┐
    compressed pools ──gather by block table───────┤
                                                   ├─ decodes:  blockwise logits, one softmax over both tiers ─┐
                                                   └─ prefills: restored history, causal, tiled over queries ──┴─► out

Decodes (one-token sequences) and prefill chunks are computed apart, so neither pads the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import COMPRESSED_INPUTS, PREFILL_TILE, StreamLayout
from minicache_trt.functions.streams import block_slices, load_stream, restore_stream, stream_logits, stream_values
from minicache_trt.functions.tape import Emitter

STEP_INPUTS = (
    "query_start",
    "context_len",
    "compressed_len",
    "slot_mapping",
    "full_table",
    "compressed_table",
    "decode_rows",
    "prefill_rows",
)
"""Decoder inputs the op takes after q, k, v and kv; those of the compressed tier only where there is one."""

GROUP_BYTES = 1 << 21
"""Gathered keys of one group of decodes: about a core's own cache."""
LARGEST = 3.0e38
"""Numbers of at least this magnitude (and NaN) are appended as zero."""


@dataclass(frozen=True)
class LayerStreams:
    """Where one layer's keys and values are in the compressed tier: layout and the layer's place in its group."""

    key: StreamLayout
    key_member: int
    value: StreamLayout
    value_member: int

    def pool_names(self) -> list[tuple[str, str]]:
        """(parameter name, graph tensor) of every pool the op reads, keys first."""
        pairs = [(f"key.{kind}", pool.name) for kind, pool in self.key.pools.items()]
        return pairs + [(f"value.{kind}", pool.name) for kind, pool in self.value.pools.items()]


def step_inputs(compressed: bool) -> list[str]:
    return [name for name in STEP_INPUTS if compressed or name not in COMPRESSED_INPUTS]


@dataclass
class _Step:
    """Values every part of the function uses. ``streams`` is None for engines without a compressed tier."""

    g: Emitter
    config: ModelConfig
    streams: LayerStreams | None
    inputs: dict[str, ir.Value]
    kv: ir.Value
    q: ir.Value

    def pools(self, part: str) -> dict[str, ir.Value]:
        return {name[len(part) + 1 :]: value for name, value in self.inputs.items() if name.startswith(f"{part}.")}


def paged_attention(name: str, config: ModelConfig, streams: LayerStreams | None) -> ir.Function:
    """Build the function for one pair of stream layouts.

    Parameters
    ----------
    name : str
        Function name in the ``minicache`` domain.
    config : ModelConfig
    streams : LayerStreams or None
        None when the plan does not compress.

    Returns
    -------
    ir.Function
        Inputs ``q [T, Hq*D]``, ``k, v [T, H*D]`` (after RoPE), ``kv [Nf, 2, H, B, D]``, the step's inputs and the pools
        of ``streams``; outputs ``out [T, Hq*D]`` and ``kv.out``.
    """
    g = Emitter("pa")
    names = ["q", "k", "v", "kv", *step_inputs(streams is not None)]
    names += [parameter for parameter, _ in streams.pool_names()] if streams else []
    parameters = {parameter: g.parameter(parameter) for parameter in names}
    inputs = {key: g.int64(value) if key in STEP_INPUTS else value for key, value in parameters.items()}
    kv = _append(g, config, inputs)
    scale = g.floats(1.0 / math.sqrt(config.head_dim))
    step = _Step(g, config, streams, inputs, kv, g.op("Mul", inputs["q"], scale))
    out = _prefill(step, _decode(step))
    return g.function(name, list(parameters.values()), [out, kv])


def _append(g: Emitter, config: ModelConfig, inputs: dict[str, ir.Value]) -> ir.Value:
    """Scatter the new keys and values into their slots; pools stay finite whatever the model produced."""
    heads, dim = config.num_kv_heads, config.head_dim
    new = g.concat([g.reshape(inputs[part], [-1, 1, heads, dim]) for part in ("k", "v")], 1)
    finite = g.op("Less", g.op("Abs", new), g.floats(LARGEST))
    new = g.op("Where", finite, new, g.floats(0.0))
    slot = g.unsqueeze(inputs["slot_mapping"], 1, 2, 3)
    tokens = g.extent(inputs["slot_mapping"], 0)
    columns = g.constant([[[[part, head] for head in range(heads)] for part in range(2)]])

    def spread(x: ir.Value, width: int) -> ir.Value:
        parts = [tokens, g.constant([2, heads, width])]
        return g.op("Expand", x, g.op("Concat", *parts, attrs={"axis": 0}))

    block, offset = g.op("Div", slot, g.constant(BLOCK_SIZE)), g.op("Mod", slot, g.constant(BLOCK_SIZE))
    place = g.concat([spread(block, 1), spread(columns, 2), spread(offset, 1)], 3)
    return g.op("ScatterND", inputs["kv"], place, new)


def _decode(step: _Step) -> ir.Value:
    """Attention of the one-token sequences, ``[Nd, Hq*D]``, in groups whose gathered keys fit a processor's cache."""
    g, config, inputs = step.g, step.config, step.inputs
    rows = inputs["decode_rows"]
    count = g.extent(rows, 0)
    blocks = [g.extent(inputs[name], 1) for name in ("full_table", "compressed_table") if name in inputs]
    block_bytes = g.constant([config.num_kv_heads * BLOCK_SIZE * config.head_dim * 4])
    row_bytes = g.op("Mul", _add(g, blocks), block_bytes)
    group = g.op("Max", g.op("Div", g.constant([GROUP_BYTES]), row_bytes), g.constant([1]))
    trips = g.op("Div", g.op("Sub", g.op("Add", count, group), g.constant([1])), group)
    width = g.constant([config.num_heads * config.head_dim])
    blank = g.op("Expand", g.floats(0.0), g.op("Concat", count, width, attrs={"axis": 0}))

    def attend(iteration: ir.Value, out: ir.Value) -> ir.Value:
        start = g.op("Mul", g.unsqueeze(iteration, 0), group)
        some = g.slice(rows, start, g.op("Add", start, group), 0)
        return g.op("ScatterND", out, g.unsqueeze(some, 1), _decode_rows(step, some))

    return _loop(g, "decode_group", trips, blank, attend)


def _loop(
    g: Emitter, name: str, trips: ir.Value, carried: ir.Value, body: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Run ``carried = body(i, carried)`` for i in [0, trips); ``trips`` is ``[1]`` int64, ``carried`` float32."""
    iteration, condition, value = (g.parameter(f"{name}.{part}") for part in ("i", "cond", "out"))
    for item, dtype in ((iteration, ir.DataType.INT64), (condition, ir.DataType.BOOL), (value, ir.DataType.FLOAT)):
        item.type = ir.TensorType(dtype)
    iteration.shape, condition.shape = ir.Shape([]), ir.Shape([])
    with g.subgraph() as tape:
        updated = body(iteration, value)
        proceed = g.op("Identity", condition)
    proceed.type, updated.type = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([iteration, condition, value], [proceed, updated], nodes=tape.nodes, name=name)
    return g.op("Loop", g.op("Squeeze", trips), None, carried, attrs={"body": graph})


def _decode_rows(step: _Step, rows: ir.Value) -> ir.Value:
    """Attention of some one-token sequences; logits are computed block by block, nothing is restored."""
    g, config, inputs = step.g, step.config, step.inputs

    def row(name: str) -> ir.Value:
        return g.op("Gather", inputs[name], rows, attrs={"axis": 0})

    def column(x: ir.Value) -> ir.Value:
        return g.unsqueeze(x, 1, 2, 3, 4)

    q = g.reshape(
        g.op("Gather", step.q, rows, attrs={"axis": 0}),
        [-1, 1, config.num_kv_heads, config.group_size, config.head_dim],
    )
    table, length = row("full_table"), row("context_len")
    if step.streams is not None:
        length = g.op("Sub", length, row("compressed_len"))
    keys = block_slices(g, step.kv, table, 0)
    logits = g.op("MatMul", q, g.swap_last(keys, 5))
    tiers = [_masked(g, logits, table, column(length))]
    value_streams = None
    if step.streams is not None:
        blocks = row("compressed_table")
        key_stream = load_stream(g, step.streams.key, step.streams.key_member, step.pools("key"), blocks)
        value_streams = load_stream(g, step.streams.value, step.streams.value_member, step.pools("value"), blocks)
        tiers.append(_masked(g, stream_logits(g, key_stream, q), blocks, column(row("compressed_len"))))
    peaks = [g.reduce("Max", tier, 1, 4) for tier in tiers]
    peak = peaks[0] if len(peaks) == 1 else g.op("Max", *peaks)
    weights = [g.op("Exp", g.op("Sub", tier, peak)) for tier in tiers]
    sums = [g.op("MatMul", weights[0], block_slices(g, step.kv, table, 1))]
    if value_streams is not None:
        sums.append(stream_values(g, value_streams, weights[1]))
    out = _add(g, [g.reduce("Sum", part, 1) for part in sums])
    total = _add(g, [g.reduce("Sum", part, 1, 4) for part in weights])
    return g.reshape(g.op("Div", out, total), [-1, config.num_heads * config.head_dim])


def _add(g: Emitter, parts: list[ir.Value]) -> ir.Value:
    return parts[0] if len(parts) == 1 else g.op("Add", *parts)


def _masked(g: Emitter, logits: ir.Value, table: ir.Value, length: ir.Value) -> ir.Value:
    """Logits ``[N, M, H, G, B]`` with tokens at or past ``length`` (within the tier) at minus infinity."""
    position = g.reshape(_arange(g, g.op("Mul", g.extent(table, 1), g.constant([BLOCK_SIZE]))), [-1, 1, 1, BLOCK_SIZE])
    return g.op("Where", g.op("Less", position, length), logits, g.floats(-math.inf))


def _arange(g: Emitter, count: ir.Value) -> ir.Value:
    """0 .. count-1 for a ``[1]`` int64 count."""
    return g.op("Range", g.constant(0), g.op("Squeeze", count), g.constant(1))


def _prefill(step: _Step, decoded: ir.Value) -> ir.Value:
    """Attention of the prefill chunks, written behind ``decoded``; ``[T, Hq*D]``. Steps without any skip it whole."""
    g = step.g
    any_chunk = g.op("Greater", g.op("Squeeze", g.extent(step.inputs["prefill_rows"], 0)), g.constant(0))
    branches = {}
    for name, attend in (("then_branch", _prefill_chunks), ("else_branch", lambda step, x: step.g.op("Identity", x))):
        with g.subgraph() as tape:
            out = attend(step, decoded)
        out.type = ir.TensorType(ir.DataType.FLOAT)
        branches[name] = ir.Graph([], [out], nodes=tape.nodes, name=f"prefill_{name}")
    return g.op("If", any_chunk, attrs=branches)


def _prefill_chunks(step: _Step, decoded: ir.Value) -> ir.Value:
    g, config, inputs = step.g, step.config, step.inputs
    tokens, decodes = g.extent(inputs["q"], 0), g.extent(inputs["decode_rows"], 0)
    chunks = g.extent(inputs["prefill_rows"], 0)
    width = config.num_heads * config.head_dim
    # One row more than there are tokens: padded queries write there.
    free = g.op("Sub", g.op("Add", tokens, g.constant([1])), decodes)
    blank = g.op("Expand", g.floats(0.0), g.op("Concat", free, g.constant([width]), attrs={"axis": 0}))
    out = g.concat([decoded, blank], 0)
    keys, values, position = _history(step, chunks, decodes)
    last = g.constant([2**31 - 1])
    length = g.slice(inputs["context_len"], decodes, last, 0)
    starts = g.slice(inputs["query_start"], decodes, last, 0)
    queries = g.op("Sub", g.slice(starts, 1, 2**31 - 1, 0), g.slice(starts, 0, -1, 0))
    first = g.unsqueeze(g.op("Sub", length, queries), 1)
    tile = g.op("Max", g.op("Min", g.extent(inputs["prefill_rows"], 1), g.constant([PREFILL_TILE])), g.constant([1]))
    trips = g.op("Div", g.extent(inputs["prefill_rows"], 1), tile)

    def attend(iteration: ir.Value, carried: ir.Value) -> ir.Value:
        return _prefill_tile(step, iteration, carried, tile, chunks, first, keys, values, position)

    looped = _loop(g, "prefill_tile", trips, out, attend)
    return g.slice(looped, g.constant([0]), tokens, 0)


def _history(step: _Step, chunks: ir.Value, decodes: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keys ``[Sp, H, D, C]``, values ``[Sp, H, C, D]`` and positions ``[Sp, 1, C]`` of all a chunk may attend to.

    Entries of the compressed tier past the compressed length get a position no query reaches.
    """
    g, config, inputs = step.g, step.config, step.inputs
    heads, dim = config.num_kv_heads, config.head_dim
    last = g.constant([2**31 - 1])
    full = g.slice(inputs["full_table"], decodes, last, 0)
    keys, values = [block_slices(g, step.kv, full, 0)], [block_slices(g, step.kv, full, 1)]
    spans = [g.op("Mul", g.extent(full, 1), g.constant([BLOCK_SIZE]))]
    position = g.unsqueeze(_arange(g, spans[0]), 0)
    if step.streams is None:
        zero = g.op("Mul", g.slice(inputs["context_len"], decodes, last, 0), g.constant(0))
        position = g.op("Add", position, g.unsqueeze(zero, 1))
    else:
        blocks = g.slice(inputs["compressed_table"], decodes, last, 0)
        compressed = g.unsqueeze(g.slice(inputs["compressed_len"], decodes, last, 0), 1)
        for part, layout, member, tiers in (
            ("key", step.streams.key, step.streams.key_member, keys),
            ("value", step.streams.value, step.streams.value_member, values),
        ):
            tiers.insert(0, restore_stream(g, load_stream(g, layout, member, step.pools(part), blocks)))
        spans.insert(0, g.op("Mul", g.extent(blocks, 1), g.constant([BLOCK_SIZE])))
        history = g.unsqueeze(_arange(g, spans[0]), 0)
        history = g.op("Where", g.op("Less", history, compressed), history, g.constant(2**31 - 1))
        position = g.concat([history, g.op("Add", position, compressed)], 1)
    flat_keys = [
        g.reshape(g.transpose(x, [0, 2, 4, 1, 3]), [chunks, heads, dim, span])
        for x, span in zip(keys, spans, strict=True)
    ]
    flat_values = [
        g.reshape(g.transpose(x, [0, 2, 1, 3, 4]), [chunks, heads, span, dim])
        for x, span in zip(values, spans, strict=True)
    ]
    return g.concat(flat_keys, 3), g.concat(flat_values, 2), g.unsqueeze(position, 1)


def _prefill_tile(
    step: _Step,
    iteration: ir.Value,
    carried: ir.Value,
    tile: ir.Value,
    chunks: ir.Value,
    first: ir.Value,
    keys: ir.Value,
    values: ir.Value,
    position: ir.Value,
) -> ir.Value:
    """One tile of queries of every chunk. ``first [Sp, 1]`` is the position of each chunk's first query."""
    g, config = step.g, step.config
    heads, group, dim = config.num_kv_heads, config.group_size, config.head_dim
    start = g.op("Mul", g.unsqueeze(iteration, 0), tile)
    rows = g.slice(step.inputs["prefill_rows"], start, g.op("Add", start, tile), 1)
    real = g.op("Min", rows, g.op("Sub", g.extent(step.q, 0), g.constant(1)))
    q = g.reshape(g.op("Gather", step.q, real, attrs={"axis": 0}), [chunks, tile, heads, group, dim])
    at = g.op("Add", first, g.op("Add", _arange(g, tile), start))
    visible = g.op("LessOrEqual", position, g.unsqueeze(at, 2))
    q = g.reshape(g.transpose(q, [0, 2, 3, 1, 4]), [chunks, heads, g.op("Mul", tile, g.constant([group])), dim])
    context = g.extent(keys, 3)
    logits = g.reshape(g.op("MatMul", q, keys), [chunks, heads, group, tile, context])
    logits = g.op("Where", g.unsqueeze(visible, 1, 2), logits, g.floats(-math.inf))
    weights = g.op("Softmax", logits, attrs={"axis": -1})
    weights = g.reshape(weights, [chunks, heads, g.op("Mul", tile, g.constant([group])), context])
    attended = g.reshape(g.op("MatMul", weights, values), [chunks, heads, group, tile, dim])
    attended = g.reshape(g.transpose(attended, [0, 3, 1, 2, 4]), [chunks, tile, heads * group * dim])
    return g.op("ScatterND", carried, g.unsqueeze(rows, 2), attended)
