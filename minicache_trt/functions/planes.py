"""Codes as linear functions of planes: unpacking in standard ONNX operators without integer bit operations."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from minicache_trt.functions.tape import Emitter


@dataclass(frozen=True)
class PlaneRule:
    """How one code of a byte follows from the planes: ``c_i = p_i - carry * p_(i+1) + offset``."""

    carry: float
    offset: float


PLANE_RULES: dict[int, tuple[PlaneRule, ...]] = {
    8: (PlaneRule(0, 128),),
    4: (PlaneRule(16, 0), PlaneRule(0, 8)),
    2: (PlaneRule(4, 0), PlaneRule(0, 0), PlaneRule(4, 0), PlaneRule(0, 2)),
}
"""Bits of a code to the rules of the codes in a byte, low bits first.

Codes are linear in the planes, so a product with codes needs products with planes only: the map goes to the query, or
to the accumulator. A plane is at most 16 times as large as its code, which costs four bits of float32's 24.
"""


def planes(g: Emitter, packed: ir.Value, bits: int) -> list[ir.Value]:
    """Planes of packed codes, as float32, one per code of a byte; see `PLANE_RULES`.

    With v the stored byte: ``v`` and ``floor(v / 16)`` for 4 bits; the low and the high half byte, each with its
    quarter rounded down, for 2 bits.
    """

    def shifted(x: ir.Value, by: float) -> ir.Value:
        return g.op("Floor", g.op("Mul", x, g.floats(1.0 / by)))

    value = g.float32(packed)
    if bits == 8:
        return [value]
    high = shifted(value, 16)
    if bits == 4:
        return [value, high]
    low = g.op("Sub", value, g.op("Mul", high, g.floats(16.0)))
    return [low, shifted(low, 4), high, shifted(high, 4)]


def plane_query(g: Emitter, q: ir.Value, bits: int) -> tuple[list[ir.Value], ir.Value]:
    """``(a, b)`` with ``q . codes = sum_i a_i . plane_i + b`` for queries ``[..., G, length]`` of rank 5."""
    rules = PLANE_RULES[bits]
    parts = split_interleaved(g, q, len(rules))
    mapped = [
        part
        if i == 0 or not rules[i - 1].carry
        else g.op("Sub", part, g.op("Mul", parts[i - 1], g.floats(rules[i - 1].carry)))
        for i, part in enumerate(parts)
    ]
    return mapped, g.op("Mul", g.reduce("Sum", parts[-1], 4), g.floats(rules[-1].offset))


def plane_sums(g: Emitter, sums: list[ir.Value], total: ir.Value, bits: int, length: int) -> ir.Value:
    """Weighted sums of codes ``[..., G, length]`` from those of planes; ``total [..., G, 1]`` is the sum of weights."""
    return interleave(
        g, codes_of_planes(g, sums, g.op("Mul", total, g.floats(PLANE_RULES[bits][-1].offset)), bits), length
    )


def codes_of_planes(g: Emitter, plane: list[ir.Value], offset: ir.Value, bits: int) -> list[ir.Value]:
    """Codes of one place in a byte each, from planes or from anything linear in them; only the last has an offset."""
    result = []
    for i, rule in enumerate(PLANE_RULES[bits]):
        code = plane[i]
        if rule.carry:
            code = g.op("Sub", code, g.op("Mul", plane[i + 1], g.floats(rule.carry)))
        result.append(g.op("Add", code, offset) if rule.offset else code)
    return result


def split_interleaved(g: Emitter, x: ir.Value, count: int) -> list[ir.Value]:
    """Components i, i + count, ... of the last of 5 axes, for each i."""
    if count == 1:
        return [x]
    big = 2**31 - 1
    return [
        g.op("Slice", x, g.constant([i]), g.constant([big]), g.constant([4]), g.constant([count])) for i in range(count)
    ]


def interleave(g: Emitter, parts: list[ir.Value], length: int) -> ir.Value:
    """Inverse of `split_interleaved`."""
    if len(parts) == 1:
        return parts[0]
    stacked = g.transpose(g.concat([g.unsqueeze(part, 4) for part in parts], 4), [0, 1, 2, 3, 5, 4])
    leading = g.op("Shape", parts[0], attrs={"start": 0, "end": 4})
    return g.op(
        "Reshape", stacked, g.op("Concat", leading, g.constant([length]), attrs={"axis": 0}), attrs={"allowzero": 1}
    )
