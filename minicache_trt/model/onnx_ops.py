"""`Ops` that emit ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from minicache_trt.config import ModelConfig, RopeConfig
from minicache_trt.functions.form import GraphForm
from minicache_trt.functions.step import softcap
from minicache_trt.functions.tape import Emitter
from minicache_trt.model.decoder import gated_mlp
from minicache_trt.model.onnx_moe import dense_mixture, mixture
from minicache_trt.model.rank_collectives import all_reduce
from minicache_trt.model.rope import inverse_frequencies

Linear = Callable[[ir.Value, str], ir.Value]
Attention = Callable[[ir.Value, ir.Value, ir.Value, int], ir.Value]
Weight = Callable[[str], ir.Value]


class OnnxOps:
    """Values are of the compute type unless they are ids or positions.

    Parameters
    ----------
    g : Emitter
    config : ModelConfig
    weight : callable
        A named weight in compute type.
    table : callable
        A named weight in its stored type (the embedding is gathered before it is cast).
    linear : callable
        ``x @ W.T (+ bias)`` in the engine's weight format.
    attention : callable
        Emits the call of `PagedAttention`.
    form : GraphForm
    """

    def __init__(
        self,
        g: Emitter,
        config: ModelConfig,
        weight: Weight,
        table: Weight,
        linear: Linear,
        attention: Attention,
        form: GraphForm,
    ) -> None:
        self._g = g
        self._config = config
        self._weight = weight
        self._table = table
        self._linear = linear
        self._attention = attention
        self._form = form

    def embed(self, ids: ir.Value) -> ir.Value:
        rows = self._g.op("Gather", self._table("embed.weight"), ids, attrs={"axis": 0})
        return self._g.cast(rows, self._form.compute)

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        return self._linear(x, name)

    def scale(self, x: ir.Value, factor: float) -> ir.Value:
        return self._g.op("Mul", x, self._g.constant(factor, self._form.compute.numpy().name))

    def softcap(self, x: ir.Value, cap: float) -> ir.Value:
        return softcap(self._g, x if self._form.wide else self._g.float32(x), cap)

    def rms_norm(self, x: ir.Value, name: str) -> ir.Value:
        g, attrs = self._g, {"epsilon": self._config.rms_norm_eps, "axis": -1}
        if not self._config.unit_offset_norm:
            return g.op("RMSNormalization", x, self._weight(f"{name}.weight"), attrs=attrs)
        weight = g.op("Add", g.float32(self._table(f"{name}.weight")), g.floats(1.0))
        if self._form.wide:
            return g.op("RMSNormalization", x, weight, attrs=attrs)
        return g.cast(g.op("RMSNormalization", g.float32(x), weight, attrs=attrs), self._form.compute)

    def head_norm(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        split = self._g.reshape(x, [-1, heads, self._config.head_dim])
        return self._g.reshape(self.rms_norm(split, name), [-1, heads * self._config.head_dim])

    def rotation(self, positions: ir.Value, rope: RopeConfig) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines with a batch axis of one in front, from the positions themselves in float32: no table."""
        g = self._g
        frequency = inverse_frequencies(rope, self._config.head_dim).numpy()
        angle = g.op("Mul", g.unsqueeze(g.float32(positions), 1), g.floats(frequency[None]))
        parts, factor = (g.op("Cos", angle), g.op("Sin", angle)), rope.attention_factor
        cos, sin = parts if factor == 1.0 else (g.op("Mul", part, g.floats(factor)) for part in parts)
        cos, sin = (part if self._form.wide else g.cast(part, self._form.compute) for part in (cos, sin))
        return g.unsqueeze(cos, 0), g.unsqueeze(sin, 0)

    def rotary(self, x: ir.Value, rotation: tuple[ir.Value, ir.Value], heads: int) -> ir.Value:
        g = self._g
        attrs = {"num_heads": heads}
        if self._config.rotary_dim != self._config.head_dim:
            attrs["rotary_embedding_dim"] = self._config.rotary_dim
        rotated = g.op("RotaryEmbedding", g.unsqueeze(x, 0), *rotation, attrs=attrs)
        return g.op("Squeeze", rotated, g.constant([0]))

    def paged_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, layer: int) -> ir.Value:
        return self._attention(q, k, v, layer)

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        return self._g.op("Add", a, b)

    def gated(self, gate: ir.Value, up: ir.Value) -> ir.Value:
        g = self._g
        if self._config.activation == "gelu_tanh":
            return g.op("Mul", g.op("Gelu", gate, attrs={"approximate": "tanh"}), up)
        return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)

    def moe(self, x: ir.Value, name: str) -> ir.Value:
        def expert(rows: ir.Value, index: int) -> ir.Value:
            return gated_mlp(self, rows, f"{name}.experts.{index}")

        router = self.linear(x, f"{name}.router")
        if not self._form.loops:
            mixed = dense_mixture(self._g, self._config, x, router, expert, self._form)
            return all_reduce(self._g, mixed, self._form)
        return mixture(self._g, self._config, x, router, expert, name, self._form)

    def take(self, x: ir.Value, rows: ir.Value) -> ir.Value:
        return self._g.op("Gather", x, rows, attrs={"axis": 0})
