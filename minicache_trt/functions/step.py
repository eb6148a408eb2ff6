"""What every part of `PagedAttention` works with: the step's inputs, one layer's streams, small helpers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.config import ModelConfig
from minicache_trt.contract import COMPRESSED_INPUTS, StreamLayout
from minicache_trt.functions.form import GraphForm
from minicache_trt.functions.stream_loading import block_slices
from minicache_trt.functions.stream_maps import StreamMaps
from minicache_trt.functions.tape import Emitter

STEP_INPUTS = (
    "query_start",
    "context_len",
    "compressed_len",
    "slot_mapping",
    "full_table",
    "compressed_table",
    "full_work",
    "compressed_work",
    "decode_rows",
    "prefill_rows",
    "prefill_past",
)
"""Decoder inputs the op takes after q, k, v and kv; those of the compressed tier only where there is one."""

MASKED = -1.0e30
"""Logit of a token outside the context: finite, so that a block without any token makes no NaN."""


def step_inputs(compressed: bool) -> list[str]:
    return [name for name in STEP_INPUTS if compressed or name not in COMPRESSED_INPUTS]


@dataclass(frozen=True)
class LayerStream:
    """Where one layer's keys or values are: the stream, the layer's place in its group, and names of its maps."""

    layout: StreamLayout
    member: int
    maps: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerStreams:
    """Where one layer's keys and values are in the compressed tier."""

    key: LayerStream
    value: LayerStream

    def inputs(self) -> list[tuple[str, str, str]]:
        """(parameter, ``pool`` or ``map``, graph tensor) of everything the op reads of the streams, keys first."""
        rows = []
        for part, own in (("key", self.key), ("value", self.value)):
            rows += [(f"{part}.{kind}", "pool", pool.name) for kind, pool in own.layout.pools.items()]
            rows += [
                (f"{part}.read.{name}", "map", read_map_name(own.layout.index, own.member, name)) for name in own.maps
            ]
        return rows


def read_map_name(stream: int, member: int, name: str) -> str:
    """Graph tensor of one of a layer's reading maps."""
    return f"stream.{stream}.read.{member}.{name}"


@dataclass
class Step:
    """Values every part of the function uses. ``streams`` is None for engines without a compressed tier.

    ``inputs`` by parameter, those of the step as int64; ``kv`` after the append, in compute type; ``q [T, Hq * D]``
    float32.
    """

    g: Emitter
    config: ModelConfig
    streams: LayerStreams | None
    inputs: dict[str, ir.Value]
    kv: ir.Value
    q: ir.Value
    form: GraphForm

    def recent(self, blocks: ir.Value, part: int) -> ir.Value:
        """Keys (``part`` 0) or values (1) of full-tier ``blocks`` (int64 ``[N]``): ``[N, H, B, D]`` float32."""
        return self.widened(block_slices(self.g, self.kv, blocks, part))

    def widened(self, x: ir.Value) -> ir.Value:
        """Numbers of the compute type as float32."""
        return x if self.form.wide else self.g.float32(x)

    def scaled(self, q: ir.Value) -> ir.Value:
        """Queries times the scale of logits; in front of a product the runtime makes it a factor of that."""
        return self.g.op("Mul", q, self.g.floats(self.config.attention_scale))

    def capped(self, logits: ir.Value) -> ir.Value:
        """Logits of attention, before anything is masked, with the model's soft cap if it has one."""
        cap = self.config.attention_softcap
        return logits if cap is None else softcap(self.g, logits, cap)

    def pools(self, part: str) -> dict[str, ir.Value]:
        """Pools of the layer's ``key`` or ``value`` stream by kind."""
        prefix = f"{part}."
        return {
            name.removeprefix(prefix): value
            for name, value in self.inputs.items()
            if name.startswith(prefix) and not name.startswith(f"{prefix}read.")
        }

    def maps(self, part: str) -> StreamMaps:
        """Reading maps of the layer's ``key`` or ``value`` stream."""
        prefix = f"{part}.read."
        own = {name.removeprefix(prefix): value for name, value in self.inputs.items() if name.startswith(prefix)}
        return StreamMaps(**own)


def softcap(g: Emitter, x: ir.Value, cap: float) -> ir.Value:
    """``cap * tanh(x / cap)`` of float32 numbers."""
    return g.op("Mul", g.op("Tanh", g.op("Mul", x, g.floats(1.0 / cap))), g.floats(cap))


def arange(g: Emitter, count: ir.Value) -> ir.Value:
    """0 .. count-1 for a ``[1]`` int64 count."""
    return g.op("Range", g.constant(0), g.op("Squeeze", count), g.constant(1))


def ceil_div(g: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    return g.op("Div", g.op("Sub", g.op("Add", a, b), g.constant([1])), b)


def scan(
    g: Emitter,
    name: str,
    inputs: Sequence[tuple[ir.Value, ir.DataType, int]],
    body: Callable[[list[ir.Value]], list[ir.Value]],
    outputs: Sequence[Sequence[int | None]],
) -> Sequence[ir.Value]:
    """Run ``body`` on the slices of every input along its first axis; outputs (float32) are stacked along a new first.

    ``inputs`` are values with dtype and rank of a slice; ``outputs`` the shapes of what the body returns.
    """
    slices = []
    for index, (_, dtype, rank) in enumerate(inputs):
        value = g.parameter(f"{name}.in{index}")
        value.type, value.shape = ir.TensorType(dtype), ir.Shape([None] * rank)
        slices.append(value)
    with g.subgraph() as tape:
        results = body(slices)
    for result, shape in zip(results, outputs, strict=True):
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph = ir.Graph(slices, results, nodes=tape.nodes, name=name)
    attrs = {"body": graph, "num_scan_inputs": len(inputs)}
    return g.op_multi("Scan", *(value for value, *_ in inputs), outputs=len(outputs), attrs=attrs)
