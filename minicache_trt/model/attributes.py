"""What a `PagedAttention` node says about itself to runtimes that have a kernel or a plugin for it."""

from __future__ import annotations

import onnx_ir as ir

from minicache_trt.config import ModelConfig
from minicache_trt.contract import DOMAIN, OP_VERSION
from minicache_trt.descriptor import stream_descriptor
from minicache_trt.functions.form import CPU_FORM, GraphForm
from minicache_trt.functions.step import LayerStreams, step_inputs
from minicache_trt.model.rope import inverse_frequencies

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": OP_VERSION}
"""On every call of a custom op: a TensorRT that knows the plugin takes it, everything else inlines the function."""


def attention_attributes(
    config: ModelConfig, streams: LayerStreams | None, form: GraphForm = CPU_FORM
) -> dict[str, ir.Attr | int | str]:
    """Attributes of one layer's node; lists are text, numbers separated by spaces.

    ``input_names``: what each input is, in order. ``key_stream``, ``value_stream``: `stream_descriptor` of the layer's
    place in its streams. ``inverse_frequencies``: of the rotary embedding, for keys stored without it. A node that
    takes the outputs of a `ChunkStep` has none: no kernel takes those.
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
    if streams is not None:
        names += [parameter for parameter, *_ in streams.inputs()]
        result["key_stream"] = _text(stream_descriptor(streams.key.layout, streams.key.member))
        result["value_stream"] = _text(stream_descriptor(streams.value.layout, streams.value.member))
        frequencies = inverse_frequencies(config.rope, config.head_dim).tolist()
        result["inverse_frequencies"] = " ".join(f"{frequency:.9g}" for frequency in frequencies)
    return result | {"input_names": " ".join(names)}


def _text(numbers: list[int]) -> str:
    return " ".join(str(number) for number in numbers)
