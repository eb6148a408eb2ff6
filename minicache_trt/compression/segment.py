"""Segments: runs of components of a stream's latent vector, and the formats they are stored in."""

from __future__ import annotations

from dataclasses import dataclass

MODEL, FLOAT8, INTEGER, GAUSSIAN, DROPPED = "model", "float8", "integer", "gaussian", "dropped"
"""Kinds of formats; each kind has one way to encode and one way to read."""


@dataclass(frozen=True)
class Format:
    """How one component is stored.

    Parameters
    ----------
    kind : str
        ``model`` (the engine's compute type), ``float8`` (e4m3 after division by a scale), ``integer`` (scale and
        minimum), ``gaussian`` (index of a Lloyd-Max level of the standard normal distribution) or ``dropped``.
    bits : int
        Of one code; 0 for ``model`` and ``dropped``, which have none.
    """

    kind: str
    bits: int


FORMATS: dict[str, Format] = {
    "model": Format(MODEL, 0),
    "fp8": Format(FLOAT8, 8),
    "int8": Format(INTEGER, 8),
    "int4": Format(INTEGER, 4),
    "int2": Format(INTEGER, 2),
    "g4": Format(GAUSSIAN, 4),
    "g3": Format(GAUSSIAN, 3),
    "g2": Format(GAUSSIAN, 2),
    "g1": Format(GAUSSIAN, 1),
    "drop": Format(DROPPED, 0),
}
AXES = ("token", "channel")
TRANSFORMS = ("none", "hadamard")


def expect(condition: bool, field: str, expected: str, got: object) -> None:
    """Raise the ``ValueError`` of a field that is out of range."""
    if not condition:
        raise ValueError(f"{field}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class Segment:
    """A run of components of a stream's latent vector, stored in one format.

    Parameters
    ----------
    length : int
        Components, a multiple of 16.
    format : str
        A key of ``FORMATS``. ``drop`` stores nothing and reads as zero.
    axis : str
        Where a range (``integer``: scale and minimum; ``float8``: scale) is shared: ``token`` (all components of one
        token and head) or ``channel`` (one component over a block, KIVI's scheme for keys). Other kinds ignore it.
    transform : str
        ``none``, or ``hadamard``: the orthonormal Walsh-Hadamard matrix (Sylvester order) over consecutive blocks of
        components, each the largest power of two that still fits (80 = 64 + 16), applied before quantization.
    """

    length: int
    format: str = "model"
    axis: str = "token"
    transform: str = "none"

    def __post_init__(self) -> None:
        expect(self.length > 0 and self.length % 16 == 0, "length", "a positive multiple of 16", self.length)
        expect(self.format in FORMATS, "format", f"one of {', '.join(FORMATS)}", self.format)
        expect(self.axis in AXES, "axis", f"one of {', '.join(AXES)}", self.axis)
        expect(self.transform in TRANSFORMS, "transform", f"one of {', '.join(TRANSFORMS)}", self.transform)

    @property
    def kind(self) -> str:
        """Kind of the format."""
        return FORMATS[self.format].kind

    @property
    def bits(self) -> int:
        """Bits of one code, 0 where there are no codes."""
        return FORMATS[self.format].bits

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's and head's codes."""
        return self.length * self.bits // 8

    @property
    def has_ranges(self) -> bool:
        """Whether a scale is stored with the codes."""
        return self.kind in (INTEGER, FLOAT8)

    @property
    def has_minimum(self) -> bool:
        """Whether a minimum is stored beside the scale."""
        return self.kind == INTEGER
