"""Codes as linear functions of planes: unpacking in standard ONNX operators without integer bit operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from minicache_trt.compression.constants import gaussian_levels
from minicache_trt.compression.segment import FLOAT8, GAUSSIAN, INTEGER, MODEL, Segment
from minicache_trt.contract import BYTE_OFFSET
from minicache_trt.functions.tape import Emitter


@dataclass(frozen=True)
class PlaneRule:
    """How one code of a byte follows from the planes: ``c_i = p_i - carry * p_(i+1) + offset``."""

    carry: float
    offset: float


NUMBERS = (PlaneRule(0, 0),)
"""The rule of segments whose only plane holds the numbers themselves."""

INTEGER_RULES: dict[int, tuple[PlaneRule, ...]] = {
    8: (PlaneRule(0, 128),),
    4: (PlaneRule(16, 0), PlaneRule(0, 8)),
    2: (PlaneRule(4, 0), PlaneRule(0, 0), PlaneRule(4, 0), PlaneRule(0, 2)),
}
"""Bits of a code to the rules of the codes in a byte, low bits first.

Codes are linear in the planes, so a product with codes needs products with planes only: the map goes to the query, or
to the accumulator. A plane is at most 16 times as large as its code, which costs four bits of float32's 24.
"""


def plane_rules(segment: Segment, lookup: bool = False) -> tuple[PlaneRule, ...]:
    """Rules of a segment's planes; codes of the integer formats, the numbers (before a scale) of the others."""
    return INTEGER_RULES[segment.bits] if segment.kind == INTEGER and not lookup else NUMBERS


def planes(g: Emitter, stored: ir.Value, segment: Segment, lookup: bool = False) -> list[ir.Value]:
    """Planes ``[N, H, B, ...]`` of a segment's stored numbers or bytes ``[N, H, B, bytes]``, as float32.

    Integer formats: with v the stored byte, ``v`` and ``floor(v / 16)`` for 4 bits; the low and the high half byte,
    each with its quarter rounded down, for 2 bits. The others are looked up: one plane of numbers. With ``lookup``,
    codes of the integer formats are looked up too, by the byte: few operators, and a memory access each.
    """
    if segment.kind == MODEL:
        return [g.float32(stored)]
    if segment.kind == FLOAT8:
        return [_looked_up(g, _byte(g, stored), float8_numbers()[:, None], stored, segment.length, lookup)]
    if segment.kind == GAUSSIAN:
        return [_levels(g, stored, segment, lookup)]
    if lookup:
        return [_looked_up(g, _byte(g, stored), integer_codes(segment.bits), stored, segment.length, True)]

    def shifted(x: ir.Value, by: float) -> ir.Value:
        return g.op("Floor", g.op("Mul", x, g.floats(1.0 / by)))

    value = g.float32(stored)
    if segment.bits == 8:
        return [value]
    high = shifted(value, 16)
    if segment.bits == 4:
        return [value, high]
    low = g.op("Sub", value, g.op("Mul", high, g.floats(16.0)))
    return [low, shifted(low, 4), high, shifted(high, 4)]


def integer_codes(bits: int) -> np.ndarray:
    """The codes of every byte, low bits first: float32 ``[256, 8 / bits]``."""
    shifts = np.arange(0, 8, bits)
    return (np.arange(256)[:, None] >> shifts & (1 << bits) - 1).astype(np.float32)


def float8_numbers() -> np.ndarray:
    """The e4m3 number of every byte, float32 ``[256]``; the two NaNs read as zero."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = np.where(exponent > 0, (8.0 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude = np.where(byte & 127 == 127, 0.0, magnitude)
    return np.where(byte > 127, -magnitude, magnitude).astype(np.float32)


def _byte(g: Emitter, stored: ir.Value) -> ir.Value:
    """Bytes 0 .. 255, int32."""
    return g.op("Add", g.cast(stored, ir.DataType.INT32), g.constant(BYTE_OFFSET, "int32"))


def _looked_up(
    g: Emitter, index: ir.Value, table: np.ndarray, like: ir.Value, length: int, copied: bool = False
) -> ir.Value:
    """Rows of ``table`` side by side: ``[N, H, B, length]``, leading axes of ``like``.

    ``copied``: by a constant shape, whose zeros mean the extents of ``index``; none of them may be 0.
    """
    rows = g.op("Gather", g.floats(table), index, attrs={"axis": 0})
    if copied:
        return g.op("Reshape", rows, g.constant([0, 0, 0, length]))
    leading = g.op("Shape", like, attrs={"start": 0, "end": 3})
    shape = g.op("Concat", leading, g.constant([length]), attrs={"axis": 0})
    return g.op("Reshape", rows, shape, attrs={"allowzero": 1})


def _levels(g: Emitter, stored: ir.Value, segment: Segment, copied: bool) -> ir.Value:
    """Lloyd-Max levels of gaussian codes. Three-bit codes are looked up four at a time, by halves of three bytes."""
    levels = np.array(gaussian_levels(segment.bits), np.float32)
    index_bits = 12 if segment.bits == 3 else 8
    index, index_values = _byte(g, stored), np.arange(1 << index_bits)
    shifts = np.arange(0, index_bits, segment.bits)
    table = levels[index_values[:, None] >> shifts & (1 << segment.bits) - 1]
    if segment.bits == 3:
        leading = g.op("Shape", stored, attrs={"start": 0, "end": 3})
        triples = g.op("Concat", leading, g.constant([segment.length // 8, 3]), attrs={"axis": 0})
        index = g.op("Reshape", index, triples, attrs={"allowzero": 1})
        weights = g.constant([1, 256, 65536], "int32")
        value = g.reduce("Sum", g.op("Mul", index, weights), 4)
        half = g.constant(1 << index_bits, "int32")
        index = g.concat([g.op("Mod", value, half), g.op("Div", value, half)], 4)
    return _looked_up(g, index, table, stored, segment.length, copied)


def plane_query(g: Emitter, q: ir.Value, rules: tuple[PlaneRule, ...]) -> tuple[list[ir.Value], ir.Value | None]:
    """``(a, b)`` with ``q . codes = sum_i a_i . plane_i + b`` for queries ``[N, H, G, length]``; b is None for zero."""
    parts = split_interleaved(g, q, len(rules))
    mapped = [
        part
        if i == 0 or not rules[i - 1].carry
        else g.op("Sub", part, g.op("Mul", parts[i - 1], g.floats(rules[i - 1].carry)))
        for i, part in enumerate(parts)
    ]
    if not rules[-1].offset:
        return mapped, None
    return mapped, g.op("Mul", g.reduce("Sum", parts[-1], 3), g.floats(rules[-1].offset))


def codes_of_planes(
    g: Emitter, plane: list[ir.Value], total: ir.Value | None, rules: tuple[PlaneRule, ...], length: int
) -> ir.Value:
    """Codes ``[N, H, x, length]`` from planes ``[N, H, x, ...]``, or from anything linear in them.

    ``total`` is what the same linear function makes of ones, ``[N, H, x, 1]``; None for the planes themselves.
    """
    codes = []
    for i, rule in enumerate(rules):
        code = plane[i]
        if rule.carry:
            code = g.op("Sub", code, g.op("Mul", plane[i + 1], g.floats(rule.carry)))
        if rule.offset:
            one = g.floats(rule.offset)
            code = g.op("Add", code, one if total is None else g.op("Mul", total, one))
        codes.append(code)
    return interleave(g, codes, length)


def split_interleaved(g: Emitter, x: ir.Value, count: int) -> list[ir.Value]:
    """Components i, i + count, ... of the last of 4 axes, for each i."""
    if count == 1:
        return [x]
    big = 2**31 - 1
    return [
        g.op("Slice", x, g.constant([i]), g.constant([big]), g.constant([3]), g.constant([count])) for i in range(count)
    ]


def interleave(g: Emitter, parts: list[ir.Value], length: int) -> ir.Value:
    """Inverse of `split_interleaved`."""
    if len(parts) == 1:
        return parts[0]
    stacked = g.concat([g.unsqueeze(part, 4) for part in parts], 4)
    leading = g.op("Shape", parts[0], attrs={"start": 0, "end": 3})
    return g.op(
        "Reshape", stacked, g.op("Concat", leading, g.constant([length]), attrs={"axis": 0}), attrs={"allowzero": 1}
    )
