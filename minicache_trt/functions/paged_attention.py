"""`PagedAttention` as an ONNX model-local function in standard operators.

    q, k, v, kv ──append──► kv.out ──► full tier ──┐
    compressed pools ──gather by block table───────┤
                                                   ├─ decodes:  partial softmax per block, combined ──────┐
                                                   └─ prefills: restored history, causal, tiled ─────────┴─► out

Decodes (one-token sequences) and prefill chunks are computed apart, so neither pads the other; in graphs without loops
they are one batch (`minicache_trt.functions.chunk_attention`).
"""

from __future__ import annotations

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.functions.chunk_attention import chunk_attention
from minicache_trt.functions.chunk_step import chunk_step, chunk_step_names
from minicache_trt.functions.decode_attention import decode_attention
from minicache_trt.functions.form import CPU_FORM, LARGEST, GraphForm
from minicache_trt.functions.prefill_attention import prefill_attention
from minicache_trt.functions.step import STEP_INPUTS, LayerStreams, Step, step_inputs
from minicache_trt.functions.tape import Emitter


def paged_attention(
    name: str, config: ModelConfig, streams: LayerStreams | None, form: GraphForm = CPU_FORM
) -> ir.Function:
    """Build the function for one pair of stream layouts.

    Parameters
    ----------
    name : str
        Function name in the ``minicache`` domain.
    config : ModelConfig
    streams : LayerStreams or None
        None when the plan does not compress.
    form : GraphForm

    Returns
    -------
    ir.Function
        Inputs ``q [T, Hq*D]``, ``k, v [T, H*D]`` (after RoPE), ``kv [Nf, 2, H, B, D]``, the step's inputs (or what
        `attention_inputs` says), then the
        pools and maps of ``streams``; outputs ``out [T, Hq*D]`` and ``kv.out``; all but the step's in compute type.
    """
    g = Emitter("pa")
    rotation = streams is not None and streams.key.layout.stream.basis == "pre_rope"
    names = attention_inputs(streams is not None, rotation, form)
    names += [parameter for parameter, *_ in streams.inputs()] if streams else []
    parameters = {parameter: g.parameter(parameter) for parameter in names}
    inputs = {key: g.int64(value) if key in STEP_INPUTS else value for key, value in parameters.items()}
    chunks: dict[str, ir.Value] = {}
    if form.shared_step:
        chunks = inputs
    elif not form.loops:
        chunks = chunk_step(g, config, {key: inputs[key] for key in step_inputs(streams is not None)}, rotation)
    new = _new(g, config, inputs, form)
    kv = g.op("ScatterND", inputs["kv"], chunks["slots"], new) if chunks else _append(g, config, inputs, new)
    q = inputs["q"] if form.wide else g.float32(inputs["q"])
    step = Step(g, config, streams, inputs, kv, q, form)
    out = chunk_attention(step, chunks) if chunks else prefill_attention(step, decode_attention(step))
    out = out if form.wide else g.cast(out, form.compute)
    return g.function(name, list(parameters.values()), [out, kv])


def attention_inputs(compressed: bool, rotation: bool, form: GraphForm) -> list[str]:
    """What the op takes before pools and maps; ``rotation``: whether the layer's keys lie un-rotated."""
    step = chunk_step_names(compressed, rotation) if form.shared_step else step_inputs(compressed)
    return ["q", "k", "v", "kv", *step]


def _new(g: Emitter, config: ModelConfig, inputs: dict[str, ir.Value], form: GraphForm) -> ir.Value:
    """The new keys and values, ``[T, 2, H, D]``; pools stay finite whatever the model produced."""
    heads, dim = config.num_kv_heads, config.head_dim
    if not form.loops:
        both = g.op("Concat", inputs["k"], inputs["v"], attrs={"axis": 1})
        return _finite(g, g.op("Reshape", both, g.constant([-1, 2, heads, dim])), form)
    return _finite(g, g.concat([g.reshape(inputs[part], [-1, 1, heads, dim]) for part in ("k", "v")], 1), form)


def _append(g: Emitter, config: ModelConfig, inputs: dict[str, ir.Value], new: ir.Value) -> ir.Value:
    """Scatter the new keys and values into their slots."""
    heads = config.num_kv_heads
    slot = g.unsqueeze(inputs["slot_mapping"], 1, 2, 3)
    tokens = g.extent(inputs["slot_mapping"], 0)
    columns = g.constant([[[[part, head] for head in range(heads)] for part in range(2)]])

    def spread(x: ir.Value, width: int) -> ir.Value:
        parts = [tokens, g.constant([2, heads, width])]
        return g.op("Expand", x, g.op("Concat", *parts, attrs={"axis": 0}))

    block, offset = g.op("Div", slot, g.constant(BLOCK_SIZE)), g.op("Mod", slot, g.constant(BLOCK_SIZE))
    place = g.concat([spread(block, 1), spread(columns, 2), spread(offset, 1)], 3)
    return g.op("ScatterND", inputs["kv"], place, new)


def _finite(g: Emitter, x: ir.Value, form: GraphForm) -> ir.Value:
    """``x [T, 2, H, D]`` with zero in place of NaN and of magnitudes of at least `LARGEST`.

    In float32 on the CPU: x > -LARGEST ? x : 0, twice, the second time from the other side: half the time of a
    comparison and a Where.
    """
    if not form.wide or not form.loops:
        dtype = form.compute.numpy().name
        limit, zero = (g.constant([[[[number]]]], dtype) for number in (LARGEST[form.compute], 0.0))
        return g.op("Where", g.op("Less", g.op("Abs", x), limit), x, zero)
    for _ in range(2):
        x = g.op("Neg", g.op("ThresholdedRelu", x, attrs={"alpha": -LARGEST[ir.DataType.FLOAT]}))
    return x
