"""The two graphs of an engine: the decoder (prefill and decode in one) and the compressor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import onnx_ir as ir

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.contract import (
    COMPRESSOR_INPUTS,
    DOMAIN,
    LOGITS,
    PoolSpec,
    StreamLayout,
    compressed_pools,
    decoder_inputs,
    full_pools,
    plan_layout,
)
from minicache_trt.functions.chunk_step import chunk_step_function, chunk_step_names
from minicache_trt.functions.compress_blocks import compress_blocks
from minicache_trt.functions.form import CPU_FORM, GraphForm
from minicache_trt.functions.paged_attention import attention_inputs, paged_attention
from minicache_trt.functions.step import LayerStream, LayerStreams, read_map_name, step_inputs
from minicache_trt.functions.tape import OPSETS, Emitter
from minicache_trt.model.attributes import attention_attributes, compression_attributes
from minicache_trt.model.decoder import decoder
from minicache_trt.model.maps import GraphMaps, names_below, writer_maps
from minicache_trt.model.onnx_ops import OnnxOps
from minicache_trt.model.rank_collectives import linear_over_ranks
from minicache_trt.model.weights import GraphWeights

IR_VERSION = 10
STREAMS_AT_ONCE = 8
"""Fewer and larger operators; what they hold in between is so many times as large, too."""
_POOL_TYPES = {"int8": ir.DataType.INT8, "float16": ir.DataType.FLOAT16}


class _Functions:
    """One function per distinct variant of an op; variants share the op's name and differ in their overload.

    TensorRT's parser knows no overloads: with ``renamed``, later variants have a number behind their name instead.
    """

    def __init__(self, renamed: bool) -> None:
        self._renamed = renamed
        self._variants: dict[tuple[str, Hashable], ir.Function] = {}
        self._counts: dict[str, int] = {}

    def get(self, op: str, variant: Hashable, build: Callable[[], ir.Function]) -> ir.Function:
        key = (op, variant)
        if key not in self._variants:
            function = build()
            count = self._counts.get(op, 0)
            self._counts[op] = count + 1
            if count and self._renamed:
                function.name = f"{op}{count}"
            elif count:
                function.overload = str(count)
            self._variants[key] = function
        return self._variants[key]

    def all(self) -> list[ir.Function]:
        return list(self._variants.values())


def _variant(layout: StreamLayout) -> Hashable:
    """Equal for streams that store and compute alike, whichever layers they hold."""
    stream = layout.stream
    same = tuple(getattr(stream, field.name) for field in fields(stream) if field.name != "layers")
    return len(stream.layers), same


def _call(
    g: Emitter, function: ir.Function, inputs: list[ir.Value], name: str, attrs: Mapping[str, Any]
) -> list[ir.Value]:
    """A call node; ``name`` is path-like, as ``layers.3.attention``."""
    values = g.op_multi(function.name, *inputs, outputs=len(function.outputs), attrs=dict(attrs), domain=DOMAIN)
    node = values[0].producer()
    assert node is not None
    node.overload, node.name = function.overload, name
    return list(values)


def _pool_type(pool: PoolSpec, form: GraphForm) -> ir.DataType:
    return form.compute if pool.dtype == "model" else _POOL_TYPES[pool.dtype]


def _pool_value(pool: PoolSpec, blocks: str, form: GraphForm) -> ir.Value:
    return ir.val(pool.name, dtype=_pool_type(pool, form), shape=[blocks, *pool.shape])


def _output(value: ir.Value, name: str, dtype: ir.DataType, shape: list[str | int]) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value


def layer_streams(
    plan: CompressionPlan, layouts: tuple[StreamLayout, ...], layer: int, tensors: Collection[str]
) -> LayerStreams:
    """Key and value stream of one layer; ``tensors``: names of the plan's maps, as `plan_maps` has them."""

    def own(part: str) -> LayerStream:
        index, member = plan.find(part, layer)
        maps = names_below(read_map_name(index, member, ""), tensors)
        return LayerStream(layouts[index], member, tuple(maps))

    return LayerStreams(own("key"), own("value"))


def build_decoder(
    config: ModelConfig, plan: CompressionPlan, weights: GraphWeights, maps: GraphMaps, form: GraphForm = CPU_FORM
) -> ir.Model:
    """Graph of the decoder.

    Parameters
    ----------
    config : ModelConfig
    plan : CompressionPlan
    weights : GraphWeights
        Emits weights and linear layers; its initializers end up in the graph.
    maps : GraphMaps
        The plan's linear maps, likewise.
    form : GraphForm
        Of ``weights`` too.

    Returns
    -------
    ir.Model
        Inputs and outputs as `minicache_trt.contract` names them. Full pools are both input and output: bind one
        buffer to both.
    """
    g = weights.emitter
    steps = {
        name: ir.val(name, dtype=ir.DataType.INT32, shape=list(shape)) for name, shape in decoder_inputs(plan).items()
    }
    full = [_pool_value(pool, "Nf", form) for pool in full_pools(config)]
    compressed = {pool.name: _pool_value(pool, "Nc", form) for pool in compressed_pools(plan, config)}
    layouts = plan_layout(plan, config)
    functions = _Functions(form.shared_step)
    updated: list[ir.Value] = []
    at_layer = [config.at_layer(layer) for layer in range(config.num_layers)]
    shared = {
        own: _chunk_step(g, own, plan, steps, functions, f"step.{kind}") if form.shared_step else steps
        for kind, own in enumerate(dict.fromkeys(at_layer))
    }

    def attention(q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value:
        known = at_layer[layer]
        streams = layer_streams(plan, layouts, layer, maps.tensors) if plan.compresses else None
        variant: Hashable = None
        rotation = streams is not None and streams.key.layout.stream.basis == "pre_rope"
        inputs = [q, k, v, full[layer]]
        inputs += [shared[known][name] for name in attention_inputs(plan.compresses, rotation, form)[len(inputs) :]]
        if streams is not None:
            variant = tuple((_variant(own.layout), own.member) for own in (streams.key, streams.value))
            inputs += [
                compressed[tensor] if kind == "pool" else maps.value(tensor) for _, kind, tensor in streams.inputs()
            ]
        function = functions.get(
            "PagedAttention", (known, variant), partial(paged_attention, "PagedAttention", known, streams, form)
        )
        attrs = attention_attributes(known, streams, form)
        out, kv = _call(g, function, inputs, f"layers.{layer}.attention", attrs)
        pool = full_pools(config)[layer]
        updated.append(_output(kv, pool.output_name, form.compute, ["Nf", *pool.shape]))
        return out

    linear = linear_over_ranks(g, weights.linear, config, form)
    ops = OnnxOps(g, config, weights.weight, weights.table, linear, attention, form)
    logits = decoder(config, ops, steps["input_ids"], steps["positions"], steps["logit_index"])
    logits = logits if form.wide else g.float32(logits)
    _output(logits, LOGITS, ir.DataType.FLOAT, ["N", config.vocab_size])
    inputs = [*steps.values(), *full, *compressed.values()]
    return _model("decoder", g, inputs, [logits, *updated], [*weights.initializers, *maps.initializers], functions)


def _chunk_step(
    g: Emitter, config: ModelConfig, plan: CompressionPlan, steps: dict[str, ir.Value], functions: _Functions, name: str
) -> dict[str, ir.Value]:
    """Outputs of the call ``name`` of `ChunkStep`, for layers that know the model as ``config``, by name."""
    rotation = any(stream.basis == "pre_rope" for stream in plan.streams)
    function = functions.get(
        "ChunkStep", config, partial(chunk_step_function, "ChunkStep", config, plan.compresses, rotation)
    )
    inputs = [steps[parameter] for parameter in step_inputs(plan.compresses)]
    return dict(zip(chunk_step_names(plan.compresses, rotation), _call(g, function, inputs, name, {}), strict=True))


def build_compressor(
    config: ModelConfig, plan: CompressionPlan, maps: GraphMaps, form: GraphForm = CPU_FORM
) -> ir.Model:
    """Graph of the compressor: full blocks into every stream's compressed blocks, all streams at once."""
    g = Emitter("compressor")
    steps = {
        name: ir.val(name, dtype=ir.DataType.INT32, shape=list(shape)) for name, shape in COMPRESSOR_INPUTS.items()
    }
    full = [_pool_value(pool, "Nf", form) for pool in full_pools(config)]
    functions = _Functions(form.shared_step)
    pools = {pool.name: _pool_value(pool, "Nc", form) for pool in compressed_pools(plan, config)}
    written: dict[str, ir.Value] = {}
    for group in _alike(plan_layout(plan, config), maps.tensors, form):
        first, count = group[0], len(group)
        writer = writer_maps(first, maps.tensors)
        build = partial(compress_blocks, "CompressBlocks", first, tuple(writer), count)
        function = functions.get("CompressBlocks", (first.config.rope, _variant(first), count), build)
        inputs = [*steps.values(), *(full[layer] for layout in group for layer in layout.stream.layers)]
        inputs += [maps.value(tensor) for tensor in writer.values()]
        own = [pool for layout in group for pool in layout.pools.values()]
        inputs += [pools[pool.name] for pool in own]
        attrs = compression_attributes(first, writer) if count == 1 else {}
        values = _call(g, function, inputs, f"streams.{first.index}.compress", attrs)
        for value, pool in zip(values, own, strict=True):
            written[pool.name] = _output(value, pool.output_name, _pool_type(pool, form), ["Nc", *pool.shape])
    outputs = [written[name] for name in pools]
    return _model("compressor", g, [*steps.values(), *full, *pools.values()], outputs, maps.initializers, functions)


def _alike(layouts: Sequence[StreamLayout], tensors: Collection[str], form: GraphForm) -> list[list[StreamLayout]]:
    """Streams that are compressed by one call.

    Each is alone where a kernel may take the call. Else up to `STREAMS_AT_ONCE` are together that store and compute
    alike and have no constants of their own; the transform is a variant's, not a stream's.
    """
    groups: dict[Hashable, list[StreamLayout]] = {}
    for layout in layouts:
        alone = not form.shared_step or writer_maps(layout, tensors).keys() - {"transform"}
        key: Hashable = layout.index if alone else (layout.config.rope, _variant(layout))
        groups.setdefault(key, []).append(layout)
    size = STREAMS_AT_ONCE
    return [same[start : start + size] for same in groups.values() for start in range(0, len(same), size)]


def _model(
    name: str,
    g: Emitter,
    inputs: list[ir.Value],
    outputs: list[ir.Value],
    initializers: list[ir.Value],
    functions: _Functions,
) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=g.nodes, initializers=initializers, opset_imports=dict(OPSETS), name=name)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="minicache-trt", functions=functions.all())
