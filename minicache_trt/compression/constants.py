"""Numbers of the codec that every implementation shares."""

from __future__ import annotations

from itertools import pairwise

SMALL_ANGLE = 1e-4
"""Below this angle (radians) SLERP becomes a normalised linear interpolation."""
ANTIPODAL_MARGIN = 1e-3
"""Above pi minus this angle the later layer's direction is taken."""
FIRST_SCORE = 4.0
"""Retention score of tokens without a meaningful angle (antipodal or zero): above every angle."""
FLOAT16_MAX = 65504.0
"""Scales, minima and norms beyond it saturate."""
FLOAT8_MAX = 448.0
"""Largest e4m3 number: scales of float8 ranges are max|y| / 448."""
KARCHER_STEPS = 2
"""Refinements of the spherical mean of more than two directions."""


def gaussian_levels(bits: int) -> tuple[float, ...]:
    """Lloyd-Max levels of the standard normal distribution for ``2**bits`` codes, ascending.

    Source: Max, *Quantizing for minimum distortion*, IRE Trans. Inf. Theory 6 (1960), table I; recomputed to seven
    digits by Lloyd's iteration (tests/compression/test_constants.py repeats it).
    """
    positive = _POSITIVE_LEVELS[bits]
    return (*(-level for level in reversed(positive)), *positive)


def gaussian_boundaries(bits: int) -> tuple[float, ...]:
    """Midpoints between neighbouring levels; code c is the number of boundaries below the number it stands for."""
    levels = gaussian_levels(bits)
    return tuple((low + high) / 2 for low, high in pairwise(levels))


_POSITIVE_LEVELS: dict[int, tuple[float, ...]] = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560053, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
