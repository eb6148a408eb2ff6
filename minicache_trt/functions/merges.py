"""Cross-layer merges in standard ONNX operators; see `compression.merge` for what they compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import onnx_ir as ir

from minicache_trt.compression.constants import ANTIPODAL_MARGIN, FIRST_SCORE, KARCHER_STEPS, SMALL_ANGLE
from minicache_trt.compression.spherical import layer_weights
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.contract import StreamLayout
from minicache_trt.functions.tape import Emitter


@dataclass(frozen=True)
class Merged:
    """A group's latent vectors and what goes with them; None where a merge has none.

    ``latent [N, H, B, stored]``, transformed; ``norms``: ``[N, Hn, B]`` per layer; ``score [N, Hn, B]``;
    ``residuals``: ``[N, H, B, D]`` per layer.
    """

    latent: ir.Value
    norms: list[ir.Value]
    score: ir.Value | None
    residuals: list[ir.Value]


def merge_group(g: Emitter, layout: StreamLayout, x: list[ir.Value], maps: dict[str, ir.Value]) -> Merged:
    """Merge the layers ``x``, each ``[N, H, B, D]`` float32 by slot and, in the pre_rope basis, un-rotated."""
    if layout.stream.merge == "linear":
        return _linear(g, layout, x, maps)
    if "align" in maps:
        x = [g.op("MatMul", layer, _member(g, maps["align"], i)) for i, layer in enumerate(x)]
    merged = _merge(g, layout, x)
    if "transform" not in maps:
        return merged
    return Merged(g.op("MatMul", merged.latent, maps["transform"]), merged.norms, merged.score, merged.residuals)


def _member(g: Emitter, x: ir.Value, index: int) -> ir.Value:
    return g.op("Gather", x, g.constant(index), attrs={"axis": 0})


def _linear(g: Emitter, layout: StreamLayout, x: list[ir.Value], maps: dict[str, ir.Value]) -> Merged:
    products = [g.op("MatMul", layer, _member(g, maps["encode"], i)) for i, layer in enumerate(x)]
    latent = g.op("Sub", g.sum(products), maps["bias"])
    if not layout.stream.retained:
        return Merged(latent, [], None, [])
    errors, sizes = [], []
    for i, layer in enumerate(x):
        back = g.op("MatMul", latent, g.swap_last(maps[f"map.{i}"], 3))
        errors.append(_square(g, g.op("Sub", layer, g.op("Add", back, maps[f"offset.{i}"]))))
        sizes.append(_square(g, layer))
    error, size = g.sum(errors), g.sum(sizes)
    if layout.stream.norm == "token":
        error, size = g.reduce("Sum", error, 1), g.reduce("Sum", size, 1)
    positive = g.op("Greater", size, g.floats(0.0))
    relative = g.op("Sqrt", g.op("Div", error, g.op("Where", positive, size, g.floats(1.0))))
    score = g.op("Where", positive, g.op("Min", relative, g.floats(FIRST_SCORE)), g.floats(0.0))
    return Merged(latent, [], score, [])


def _square(g: Emitter, x: ir.Value) -> ir.Value:
    """Squared length of the last axis."""
    return g.reduce("Sum", g.op("Mul", x, x), 3, keep=False)


def _merge(g: Emitter, layout: StreamLayout, x: list[ir.Value]) -> Merged:
    stream = layout.stream
    if stream.merge == "none":
        return Merged(x[0], [], None, [])
    heads, dim = layout.config.num_kv_heads, layout.config.head_dim
    token = stream.norm == "token"

    def joined(v: ir.Value) -> ir.Value:
        return g.reshape(g.transpose(v, [0, 2, 1, 3]), [-1, 1, BLOCK_SIZE, heads * dim]) if token else v

    def split(v: ir.Value) -> ir.Value:
        return g.transpose(g.reshape(v, [-1, BLOCK_SIZE, heads, dim]), [0, 2, 1, 3]) if token else v

    vectors = [joined(v) for v in x]
    norms, units = zip(*(_direction(g, v) for v in vectors), strict=True)
    angles = [_angle(g, a, b) for a, b in combinations(units, 2)]
    omega = angles[0] if len(angles) == 1 else g.op("Max", *angles)
    meaningless = g.op("Greater", omega, g.floats(math.pi - ANTIPODAL_MARGIN))
    for unit in units:
        meaningless = g.op("Or", meaningless, _is_zero(g, unit))
    score = g.op("Squeeze", g.op("Where", meaningless, g.floats(FIRST_SCORE), omega), g.constant([3]))
    if stream.merge == "mean":
        return Merged(g.op("Mul", g.sum(x), g.floats(1 / len(x))), [], score, [])
    merged = _spherical(g, stream, list(units), omega, meaningless)
    residuals = []
    if layout.residual is not None:
        residuals = [split(g.op("Sub", unit, merged)) for unit in units]
    return Merged(split(merged), [g.op("Squeeze", norm, g.constant([3])) for norm in norms], score, residuals)


def _direction(g: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    norm = g.op("Sqrt", g.reduce("Sum", g.op("Mul", x, x), 3))
    positive = g.op("Greater", norm, g.floats(0.0))
    safe = g.op("Where", positive, norm, g.floats(1.0))
    return norm, g.op("Where", positive, g.op("Div", x, safe), g.floats(0.0))


def _angle(g: Emitter, a: ir.Value, b: ir.Value) -> ir.Value:
    cosine = g.reduce("Sum", g.op("Mul", a, b), 3)
    return g.op("Acos", g.op("Clip", cosine, g.floats(-1.0), g.floats(1.0)))


def _is_zero(g: Emitter, unit: ir.Value) -> ir.Value:
    return g.op("Equal", g.reduce("Max", g.op("Abs", unit), 3), g.floats(0.0))


def _spherical(g: Emitter, stream: Stream, units: list[ir.Value], omega: ir.Value, meaningless: ir.Value) -> ir.Value:
    if len(units) == 2:
        return g.op("Where", meaningless, units[1], _slerp(g, units[0], units[1], omega, stream.t))
    return _karcher(g, stream, units, meaningless)


def _slerp(g: Emitter, a: ir.Value, b: ir.Value, omega: ir.Value, t: float) -> ir.Value:
    def blend(weight_a: ir.Value, weight_b: ir.Value) -> ir.Value:
        return g.op("Add", g.op("Mul", weight_a, a), g.op("Mul", weight_b, b))

    sine = g.op("Sin", omega)
    safe = g.op("Where", g.op("Greater", sine, g.floats(0.0)), sine, g.floats(1.0))
    weights = [g.op("Div", g.op("Sin", g.op("Mul", omega, g.floats(w))), safe) for w in (1.0 - t, t)]
    _, straight = _direction(g, blend(g.floats(1.0 - t), g.floats(t)))
    return g.op("Where", g.op("Less", omega, g.floats(SMALL_ANGLE)), straight, blend(*weights))


def _karcher(g: Emitter, stream: Stream, units: list[ir.Value], meaningless: ir.Value) -> ir.Value:
    """Weighted spherical mean: the normalised weighted sum, refined in the tangent space of the current mean."""
    weights = layer_weights(len(units), stream.t)
    _, mean = _direction(g, g.sum([g.op("Mul", u, g.floats(w)) for u, w in zip(units, weights, strict=True)]))
    meaningless = g.op("Or", meaningless, _is_zero(g, mean))
    for _ in range(KARCHER_STEPS):
        steps = [g.op("Mul", _log(g, mean, u), g.floats(w)) for u, w in zip(units, weights, strict=True)]
        length, toward = _direction(g, g.sum(steps))
        moved = g.op("Add", g.op("Mul", g.op("Cos", length), mean), g.op("Mul", g.op("Sin", length), toward))
        _, mean = _direction(g, moved)
    return g.op("Where", meaningless, units[-1], mean)


def _log(g: Emitter, base: ir.Value, u: ir.Value) -> ir.Value:
    """Tangent vector at ``base`` that points to ``u`` and is as long as the angle between them."""
    theta = _angle(g, base, u)
    flat = g.op("Sub", u, g.op("Mul", g.op("Cos", theta), base))
    sine = g.op("Sin", theta)
    small = g.op("Less", theta, g.floats(SMALL_ANGLE))
    factor = g.op("Div", theta, g.op("Where", small, g.floats(1.0), sine))
    return g.op("Mul", flat, g.op("Where", small, g.floats(1.0), factor))
