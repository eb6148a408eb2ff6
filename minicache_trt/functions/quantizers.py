"""Segments of a latent vector to stored codes and ranges in standard ONNX operators; see `compression.quantize`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.compression.constants import FLOAT8_MAX, FLOAT16_MAX, gaussian_boundaries
from minicache_trt.compression.segment import FLOAT8, Segment
from minicache_trt.contract import BYTE_OFFSET
from minicache_trt.functions.tape import Emitter

PACKED_AT_ONCE = 64
"""Most codes of a vector that one product packs; a multiple of the codes in a group."""


@dataclass(frozen=True)
class Quantized:
    """``codes``: int8 ``[N, H, x, bytes]`` as the contract packs them. ``params``: float16 scales, then minima."""

    codes: ir.Value
    params: list[ir.Value]


def float16(g: Emitter, x: ir.Value) -> ir.Value:
    """Rounded to float16; magnitudes above its range become its largest number."""
    return g.cast(g.op("Clip", x, g.floats(-FLOAT16_MAX), g.floats(FLOAT16_MAX)), ir.DataType.FLOAT16)


def quantize_ranges(g: Emitter, segment: Segment, y: ir.Value, retained: ir.Value | None, heads: int) -> Quantized:
    """Integer and float8 segments ``y [N, H, x, length]``.

    ``retained [N, Hn, x]`` is 1.0 for tokens that, with axis ``channel``, do not widen ranges and have code 0.
    """
    axis = 3 if segment.axis == "token" else 2
    keep = None
    if segment.axis == "channel" and retained is not None:
        keep = g.op("Equal", g.unsqueeze(retained, 3), g.floats(0.0))

    def bound(kind: str, of: ir.Value, outside: float) -> ir.Value:
        inside = of if keep is None else g.op("Where", keep, of, g.floats(outside))
        return g.reduce(kind, inside, axis, keep=False)

    if segment.kind == FLOAT8:
        scale = float16(g, g.op("Div", bound("Max", g.op("Abs", y), 0.0), g.floats(FLOAT8_MAX)))
        ratio, positive = _ratio(g, y, scale, axis)
        codes, params = _float8_bytes(g, ratio), [scale]
    else:
        low, high = bound("Min", y, math.inf), bound("Max", y, -math.inf)
        levels = float(2**segment.bits - 1)
        scale = float16(g, g.op("Div", g.op("Sub", high, low), g.floats(levels)))
        minimum = float16(g, low)
        ratio, positive = _ratio(g, g.op("Sub", y, g.unsqueeze(g.float32(minimum), axis)), scale, axis)
        codes, params = g.op("Clip", g.op("Round", ratio), g.floats(0.0), g.floats(levels)), [scale, minimum]
    coded = positive if keep is None else g.op("And", positive, keep)
    return Quantized(pack(g, g.op("Where", coded, codes, g.floats(0.0)), segment, heads), params)


def _ratio(g: Emitter, y: ir.Value, scale: ir.Value, axis: int) -> tuple[ir.Value, ir.Value]:
    """``y / scale`` and where the scale is positive."""
    step = g.unsqueeze(g.float32(scale), axis)
    positive = g.op("Greater", step, g.floats(0.0))
    return g.op("Div", y, g.op("Where", positive, step, g.floats(1.0))), positive


def _float8_bytes(g: Emitter, x: ir.Value) -> ir.Value:
    """e4m3 byte of each number as float32, round half even, saturating at 448.

    With E = max(floor(log2 |x|), -6), the seven low bits are round(|x| * 2**(3 - E)) + 8 (E + 6): rounding up to the
    next power of two carries into the exponent, and so does an E that is one too small or too large beside it.
    """
    magnitude = g.op("Min", g.op("Abs", x), g.floats(FLOAT8_MAX))
    smallest = g.op("Max", magnitude, g.floats(2.0**-6))
    exponent = g.op("Floor", g.op("Mul", g.op("Log", smallest), g.floats(1 / math.log(2))))
    scaled = g.op("Mul", magnitude, g.op("Pow", g.floats(2.0), g.op("Sub", g.floats(3.0), exponent)))
    code = g.op("Add", g.op("Round", scaled), g.op("Mul", g.op("Add", exponent, g.floats(6.0)), g.floats(8.0)))
    sign = g.op("Where", g.op("Less", x, g.floats(0.0)), g.floats(128.0), g.floats(0.0))
    return g.op("Add", code, sign)


def quantize_gaussian(g: Emitter, segment: Segment, u: ir.Value, heads: int) -> Quantized:
    """Gaussian segment ``u [N, H, B, length]`` (divided by its norm): the number of boundaries below each."""
    code: ir.Value | None = None
    for boundary in gaussian_boundaries(segment.bits):
        above = g.float32(g.op("Greater", u, g.floats(boundary)))
        code = above if code is None else g.op("Add", code, above)
    assert code is not None
    return Quantized(pack(g, code, segment, heads), [])


def pack(g: Emitter, codes: ir.Value, segment: Segment, heads: int) -> ir.Value:
    """float32 codes ``[N, H, x, length]`` as int8 ``[N, H, x, bytes]``, low bits first, byte minus `BYTE_OFFSET`.

    A product with a matrix of places puts the codes of a group together: multiplying by a few weights and adding up
    along a short axis takes ONNX Runtime far longer. It is exact: three-bit codes fill three bytes by eights, and the
    sum of their places fits float32's 24 bits; codes and places are exact in fewer bits too, as TF32 has.
    """
    value, bits = codes, segment.bits
    per_group, group_bytes = (8, 3) if bits == 3 else (8 // bits, 1)
    if per_group > 1:
        rows = g.op("Shape", codes, attrs={"start": 2, "end": 3})
        width = math.gcd(segment.length, PACKED_AT_ONCE)
        if width < segment.length:
            value = g.reshape(value, [-1, heads, rows, segment.length // width, width])
        value = g.op("MatMul", value, g.floats(_places(width, per_group, bits)))
        if group_bytes > 1:
            value = g.reshape(value, [-1, heads, rows, segment.length // per_group, 1])
            shifted = g.op("Floor", g.op("Mul", value, g.floats([1.0, 1 / 256, 1 / 65536])))
            value = g.op("Mod", shifted, g.floats(256.0), attrs={"fmod": 1})
        if group_bytes > 1 or width < segment.length:
            value = g.reshape(value, [-1, heads, rows, segment.code_bytes])
    return g.cast(g.op("Sub", value, g.floats(float(BYTE_OFFSET))), ir.DataType.INT8)


def _places(width: int, per_group: int, bits: int) -> list[list[float]]:
    """``[width, width / per_group]``: what each code counts for in the number of its group."""
    groups = range(width // per_group)
    return [[float(1 << bits * (i % per_group)) * (i // per_group == group) for group in groups] for i in range(width)]
