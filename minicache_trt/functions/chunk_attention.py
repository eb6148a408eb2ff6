"""A step as one batch of chunks, without loops or branches: what TensorRT takes where it has no plugin.

    q ──gather──► [S, H, Q * G, D] ──► logits over both tiers ──► mask, softmax ──► values ──gather──► [T, Hq * D]

History is restored in full. A step that mixes decodes and prefill chunks is right, but pads the decodes to the longest
chunk: run the two apart. No tensor is empty in a step of at least one sequence, and no shape depends on data.
"""

from __future__ import annotations

import onnx_ir as ir

from minicache_trt.functions.step import LayerStream, Step
from minicache_trt.functions.stream_loading import load_stream
from minicache_trt.functions.stream_restoring import Rotation, restore_stream
from minicache_trt.functions.streams import to_heads


def chunk_attention(step: Step, chunks: dict[str, ir.Value]) -> ir.Value:
    """``[T, Hq * D]`` float32. ``chunks``: see `minicache_trt.functions.chunk_step`."""
    g, config = step.g, step.config
    heads, group, dim = config.num_kv_heads, config.group_size, config.head_dim

    def reshape(x: ir.Value, *shape: int) -> ir.Value:
        """0 copies an extent: a constant shape is one layer in TensorRT, one that is put together is ten."""
        return g.op("Reshape", x, g.constant(list(shape)))

    q = g.op("Mul", step.q, g.floats([[config.attention_scale]]))
    q = g.op("Gather", q, chunks["rows"], attrs={"axis": 0})
    if group == 1:
        q = g.transpose(reshape(q, 0, 0, heads, dim), [0, 2, 1, 3])
    else:
        q = reshape(g.transpose(reshape(q, 0, 0, heads, group, dim), [0, 2, 1, 3, 4]), 0, heads, -1, dim)
    keys, values = (_history(step, chunks, part) for part in range(2))
    logits = g.op("Add", step.capped(g.op("MatMul", q, g.swap_last(keys, 4))), chunks["hidden"])
    out = g.op("MatMul", g.op("Softmax", logits, attrs={"axis": -1}), values)
    if group == 1:
        out = g.transpose(out, [0, 2, 1, 3])
    else:
        out = g.transpose(reshape(out, 0, heads, -1, group, dim), [0, 2, 1, 3, 4])
    return g.op("Gather", reshape(out, -1, heads * group * dim), chunks["places"], attrs={"axis": 0})


def _history(step: Step, chunks: dict[str, ir.Value], part: int) -> ir.Value:
    """Keys (``part`` 0) or values (1) of both tiers, compressed first: ``[S, H, C, D]`` float32."""
    g, config = step.g, step.config
    places = chunks["full_values" if part else "full_keys"]
    tiers = [step.widened(g.op("GatherND", step.kv, places))]
    if step.streams is not None:
        own = step.streams.value if part else step.streams.key
        restored = _restored(step, chunks, own, "value" if part else "key")
        tiers.insert(0, g.op("Reshape", restored, chunks["compressed_split"], attrs={"allowzero": 1}))
    shape = g.constant([0, config.num_kv_heads, -1, config.head_dim])
    return g.op("Reshape", g.transpose(g.concat(tiers, 1), [0, 2, 1, 3, 4]), shape)


def _restored(step: Step, chunks: dict[str, ir.Value], own: LayerStream, part: str) -> ir.Value:
    """``[S * Mc, H, B, D]`` of the compressed tier, by KV head."""
    g, maps, rotation = step.g, step.maps(part), None
    if own.layout.stream.basis == "pre_rope":
        rotation = Rotation(chunks["cos"], chunks["sin"], whole=True)
    blocks = chunks["compressed_blocks"]
    stream = load_stream(g, own.layout, own.member, step.pools(part), blocks, lookup=True)
    return to_heads(g, restore_stream(g, own.layout, stream, maps, rotation), maps)
