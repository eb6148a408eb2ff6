"""`PagedAttention` as an ONNX model-local function in standard operators.

    q, k, v, kv ──append──► kv.out ──► full tier ──┐
    compressed pools ──gather by block table───────┤
                                                   ├─ decodes:  partial softmax per block, combined ──────┐
                                                   └─ prefills: restored history, causal, tiled ─────────┴─► out

Decodes (one-token sequences) and prefill chunks are computed apart, so neither pads the other.
"""

from __future__ import annotations

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.functions.decode_attention import decode_attention
from minicache_trt.functions.prefill_attention import prefill_attention
from minicache_trt.functions.step import STEP_INPUTS, LayerStreams, Step, step_inputs
from minicache_trt.functions.tape import Emitter

LARGEST = 3.0e38
"""Numbers of at least this magnitude (and NaN) are appended as zero."""


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
        Inputs ``q [T, Hq*D]``, ``k, v [T, H*D]`` (after RoPE), ``kv [Nf, 2, H, B, D]``, the step's inputs, then the
        pools and maps of ``streams``; outputs ``out [T, Hq*D]`` and ``kv.out``.
    """
    g = Emitter("pa")
    names = ["q", "k", "v", "kv", *step_inputs(streams is not None)]
    names += [parameter for parameter, *_ in streams.inputs()] if streams else []
    parameters = {parameter: g.parameter(parameter) for parameter in names}
    inputs = {key: g.int64(value) if key in STEP_INPUTS else value for key, value in parameters.items()}
    kv = _append(g, config, inputs)
    step = Step(g, config, streams, inputs, kv, inputs["q"])
    out = prefill_attention(step, decode_attention(step))
    return g.function(name, list(parameters.values()), [out, kv])


def _append(g: Emitter, config: ModelConfig, inputs: dict[str, ir.Value]) -> ir.Value:
    """Scatter the new keys and values into their slots; pools stay finite whatever the model produced."""
    heads, dim = config.num_kv_heads, config.head_dim
    new = g.concat([g.reshape(inputs[part], [-1, 1, heads, dim]) for part in ("k", "v")], 1)
    new = _finite(g, new)
    slot = g.unsqueeze(inputs["slot_mapping"], 1, 2, 3)
    tokens = g.extent(inputs["slot_mapping"], 0)
    columns = g.constant([[[[part, head] for head in range(heads)] for part in range(2)]])

    def spread(x: ir.Value, width: int) -> ir.Value:
        parts = [tokens, g.constant([2, heads, width])]
        return g.op("Expand", x, g.op("Concat", *parts, attrs={"axis": 0}))

    block, offset = g.op("Div", slot, g.constant(BLOCK_SIZE)), g.op("Mod", slot, g.constant(BLOCK_SIZE))
    place = g.concat([spread(block, 1), spread(columns, 2), spread(offset, 1)], 3)
    return g.op("ScatterND", inputs["kv"], place, new)


def _finite(g: Emitter, x: ir.Value) -> ir.Value:
    """``x`` with zero in place of NaN and of magnitudes of at least `LARGEST`.

    x > -LARGEST ? x : 0, twice, the second time from the other side: half the time of a comparison and a Where.
    """
    for _ in range(2):
        x = g.op("Neg", g.op("ThresholdedRelu", x, attrs={"alpha": -LARGEST}))
    return x
