"""Restored keys and values of a compressed stream: what prefill attends to, and decodes in the pre_rope basis."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout
from minicache_trt.functions.stream_loading import StreamValues, numbers
from minicache_trt.functions.stream_maps import StreamMaps
from minicache_trt.functions.streams import drop_kept
from minicache_trt.functions.tape import Emitter
from minicache_trt.model.rope import inverse_frequencies


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every token's position, ``[N, 1, B, D / 2]``; for RotaryEmbedding (``whole``)
    ``[N, B, D / 2]``."""

    cos: ir.Value
    sin: ir.Value
    whole: bool = False

    def apply(self, g: Emitter, x: ir.Value, dim: int, inverse: bool = False) -> ir.Value:
        """Rotate ``x [N, H, B, D]``, halves paired, by its positions or (``inverse``) back."""
        if self.whole:
            sin = g.op("Neg", self.sin) if inverse else self.sin
            return g.op("RotaryEmbedding", x, self.cos, sin)
        first, second = g.slice(x, 0, dim // 2, 3), g.slice(x, dim // 2, dim, 3)
        left, right = ("Add", "Sub") if inverse else ("Sub", "Add")

        def both(kind: str, a: ir.Value, b: ir.Value) -> ir.Value:
            return g.op(kind, g.op("Mul", a, self.cos), g.op("Mul", b, self.sin))

        return g.concat([both(left, first, second), both(right, second, first)], 3)


def block_rotation(g: Emitter, config: ModelConfig, number: ir.Value) -> Rotation:
    """Rotation of every token of blocks with these numbers (int64 ``[N]``) within their sequence."""
    first = g.op("Mul", g.unsqueeze(number, 1), g.constant(BLOCK_SIZE))
    position = g.float32(g.op("Add", first, g.constant(list(range(BLOCK_SIZE)))))
    angle = g.op(
        "Mul", g.unsqueeze(position, 1, 3), g.floats(inverse_frequencies(config.rope, config.head_dim).numpy())
    )
    return Rotation(g.op("Cos", angle), g.op("Sin", angle))


def restore_stream(
    g: Emitter, layout: StreamLayout, stream: StreamValues, maps: StreamMaps, rotation: Rotation | None
) -> ir.Value:
    """Restored keys or values ``[N, H, B, D]`` by slot, retained tokens exact.

    ``rotation`` is that of the blocks' positions, for keys in the pre_rope basis.
    """
    x = g.concat([numbers(g, values) for values in stream.segments], 3)
    if maps.map is not None:
        x = g.op("MatMul", x, g.swap_last(maps.map, 3))
    if stream.residual is not None:
        residual = numbers(g, stream.residual)
        if maps.residual_map is not None:
            residual = g.op("MatMul", residual, g.swap_last(maps.residual_map, 3))
        x = g.op("Add", x, residual)
    if stream.norms is not None:
        x = g.op("Mul", x, g.swap_last(stream.norms, 4))
    if maps.offset is not None:
        x = g.op("Add", x, maps.offset)
    if layout.stream.basis == "pre_rope":
        assert rotation is not None
        x = rotation.apply(g, x, layout.config.head_dim)
    if stream.exact is not None and stream.chosen is not None and stream.kept is not None:
        exact = g.op("MatMul", g.swap_last(stream.chosen, 4), stream.exact)
        x = g.op("Add", drop_kept(g, x, g.swap_last(stream.kept, 4)), exact)
    return x
