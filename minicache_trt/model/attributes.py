"""What the nodes of the custom ops say about themselves to runtimes that have a kernel or a plugin for them."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from minicache_trt.config import ModelConfig
from minicache_trt.contract import COMPRESSOR_INPUTS, DOMAIN, OP_VERSION, StreamLayout
from minicache_trt.descriptor import stream_descriptor, stream_numbers
from minicache_trt.functions.form import CPU_FORM, GraphForm
from minicache_trt.functions.step import LayerStreams, step_inputs
from minicache_trt.model.rope import inverse_frequencies

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": OP_VERSION}
"""On every call of a custom op: a TensorRT that knows the plugin takes it, everything else inlines the function."""


def attention_attributes(
    config: ModelConfig, streams: LayerStreams | None, form: GraphForm = CPU_FORM
) -> dict[str, ir.Attr | int | str]:
    """Attributes of one layer's node; ``config``: as the layer knows it (`ModelConfig.at_layer`).

    Lists are text, numbers separated by spaces. ``logit_numbers``: scale and soft cap (0: none) of logits, where they
    are not 1 / sqrt(D) and none. ``input_names``: what each input is, in order. ``key_stream``, ``value_stream``:
    `stream_descriptor` of the layer's place in its streams. ``inverse_frequencies``: of the rotary embedding, for keys
    stored without it. A node that takes the outputs of a `ChunkStep` has none: no kernel takes those.
    """
    if form.shared_step:
        return {}
    names = ["q", "k", "v", "kv", *step_inputs(streams is not None)]
    result: dict[str, ir.Attr | int | str] = {
        **PLUGIN_ATTRIBUTES,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "sliding_window": config.sliding_window or 0,
    }
    if config.query_scalar is not None or config.attention_softcap is not None:
        result["logit_numbers"] = _floats([config.attention_scale, config.attention_softcap or 0.0])
    if streams is not None:
        names += [parameter for parameter, *_ in streams.inputs()]
        result["key_stream"] = _text(stream_descriptor(streams.key.layout, streams.key.member))
        result["value_stream"] = _text(stream_descriptor(streams.value.layout, streams.value.member))
        result["inverse_frequencies"] = _frequencies(config)
    return result | {"input_names": " ".join(names)}


def compression_attributes(layout: StreamLayout, maps: Iterable[str]) -> dict[str, ir.Attr | int | str]:
    """Attributes of one stream's `CompressBlocks` node; ``maps``: names of the linear maps it takes, in order.

    ``input_names`` and ``inverse_frequencies`` as in `attention_attributes`; ``stream``: `stream_descriptor`;
    ``stream_numbers``: `stream_numbers`.
    """
    config = layout.config
    layers = [f"kv{member}" for member in range(len(layout.stream.layers))]
    return {
        **PLUGIN_ATTRIBUTES,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "stream": _text(stream_descriptor(layout)),
        "stream_numbers": _floats(stream_numbers(layout)),
        "inverse_frequencies": _frequencies(config),
        "input_names": " ".join([*COMPRESSOR_INPUTS, *layers, *maps, *layout.pools]),
    }


def _frequencies(config: ModelConfig) -> str:
    return _floats(inverse_frequencies(config.rope, config.head_dim).tolist())


def _floats(numbers: list[float]) -> str:
    """Enough digits for float32."""
    return " ".join(f"{number:.9g}" for number in numbers)


def _text(numbers: list[int]) -> str:
    return " ".join(str(number) for number in numbers)
