"""Streams: the keys or the values of one group of layers, and how they are merged, rotated and retained."""

from __future__ import annotations

from dataclasses import dataclass

from minicache_trt.compression.segment import DROPPED, GAUSSIAN, MODEL, Segment, expect
from minicache_trt.config import BLOCK_SIZE

PARTS = ("key", "value")
MERGES = ("none", "mean", "slerp", "linear")
BASES = ("post_rope", "pre_rope")
NORMS = ("head", "token")
RETENTION_RULES = ("topk", "threshold", "paper_literal")
RETAINED_FORMATS = ("model", "fp8", "int8", "int4")
RESIDUAL_FORMATS = ("none", "int8", "int4", "int2")
MAX_GROUP = 8
"""Layers one stream may hold."""
MAX_RANK = 256
"""Components of a linear stream's latent vector (kernels keep one in registers)."""


@dataclass(frozen=True)
class Stream:
    """Keys or values of one group of layers.

    One token and KV head goes through::

        x_1 .. x_m --un-rotate--> --match heads, align--> --merge--> y --transform, quantize each segment--> codes

    Parameters
    ----------
    part : str
        ``key`` (after RoPE, as the full tier holds it) or ``value``.
    layers : tuple of int
        The group, ascending: one for ``none``, two or more for ``mean`` and ``slerp``, any number for ``linear``.
    segments : tuple of Segment
        Storage of the latent vector y, 1 to 4 of them. Their lengths add up to head_dim, for ``linear`` to the rank
        r <= m * head_dim. Gaussian segments do not stand beside quantized or ``model`` ones, nor in ``slerp`` streams.
    merge : str
        ``none`` | ``mean`` (arithmetic mean) | ``slerp`` (spherical interpolation of directions plus one norm per
        layer; arXiv 2405.14366 section 3.2; beyond two layers the weighted spherical mean) | ``linear``
        (y = ([x_1 .. x_m] - mean) encode, with the plan's matrices: the calibrated joint KLT).
    basis : str
        Keys only: ``post_rope``, or ``pre_rope``: the compressor un-rotates by position, readers rotate again.
    align : bool
        Multiply each layer's heads by the plan's orthogonal ``align`` matrices first.
    match_heads : bool
        Slot h of layer i holds KV head ``head_map[i, h]`` of the plan.
    t : float
        ``slerp``: interpolation weight of the later layer, in [0, 1]. Beyond two layers, layer i has a weight
        proportional to t**i * (1 - t)**(m - 1 - i).
    norm : str
        Granularity of slerp's magnitude and direction, and of retention: ``head`` (per token and KV head) or ``token``
        (one vector over all heads, as in the paper).
    retained : int
        Capacity R: tokens per block (and head, for ``norm="head"``) stored exactly.
    retention : str
        ``topk``: the R most distant tokens of each block. ``threshold``: those with a distance above
        max - (max - min) * gamma, the most distant first, up to R. Both deviate from the printed formula of the paper
        and follow its text. ``paper_literal``: the printed formula, distance below min + (max - min) * gamma, which
        keeps the closest; it exists to reproduce that result.
    gamma : float
        Of the two threshold rules, in [0, 1].
    sink_tokens : int
        First positions of the sequence always retained, at most R.
    retained_format : str
        Format of the retained vectors: ``model``, or quantized with a range per token, head and layer.
    residual : str
        ``slerp``: format of each layer's x_i / |x_i| - e, with a range per token, head and layer; ``none`` is the
        paper.
    """

    part: str
    layers: tuple[int, ...]
    segments: tuple[Segment, ...]
    merge: str = "none"
    basis: str = "post_rope"
    align: bool = False
    match_heads: bool = False
    t: float = 0.6
    norm: str = "head"
    retained: int = 0
    retention: str = "topk"
    gamma: float = 0.05
    sink_tokens: int = 0
    retained_format: str = "model"
    residual: str = "none"

    def __post_init__(self) -> None:
        self._check_group()
        self._check_segments()
        self._check_retention()
        expect(0.0 <= self.t <= 1.0, "t", "a number in [0, 1]", self.t)
        expect(self.norm in NORMS, "norm", f"one of {', '.join(NORMS)}", self.norm)
        expect(self.residual in RESIDUAL_FORMATS, "residual", f"one of {', '.join(RESIDUAL_FORMATS)}", self.residual)
        expect(
            self.residual == "none" or self.merge == "slerp",
            "residual",
            "'none' unless merge is 'slerp'",
            self.residual,
        )

    def _check_group(self) -> None:
        expect(self.part in PARTS, "part", f"one of {', '.join(PARTS)}", self.part)
        expect(self.merge in MERGES, "merge", f"one of {', '.join(MERGES)}", self.merge)
        expect(self.basis in BASES, "basis", f"one of {', '.join(BASES)}", self.basis)
        expect(self.basis == "post_rope" or self.part == "key", "basis", "'post_rope' for values", self.basis)
        lowest, highest = {"none": (1, 1), "linear": (1, MAX_GROUP)}.get(self.merge, (2, MAX_GROUP))
        sizes = str(lowest) if lowest == highest else f"{lowest} to {highest}"
        expect(
            lowest <= len(self.layers) <= highest,
            "layers",
            f"{sizes} layer(s) for merge {self.merge!r}",
            [*self.layers],
        )
        expect(list(self.layers) == sorted(set(self.layers)), "layers", "ascending, distinct layers", [*self.layers])

    def _check_segments(self) -> None:
        expect(1 <= len(self.segments) <= 4, "segments", "1 to 4 segments", len(self.segments))
        kinds = {segment.kind for segment in self.segments} - {DROPPED}
        expect(bool(kinds), "segments", "at least one that is not dropped", [s.format for s in self.segments])
        if GAUSSIAN in kinds:
            expect(kinds == {GAUSSIAN}, "segments", "gaussian segments only", [s.format for s in self.segments])
            expect(self.merge != "slerp", "segments", "no gaussian ones for merge 'slerp'", self.segments[0].format)
        if self.merge == "linear":
            expect(self.rank <= MAX_RANK, "segments", f"at most {MAX_RANK} components", self.rank)

    def _check_retention(self) -> None:
        expect(self.retention in RETENTION_RULES, "retention", f"one of {', '.join(RETENTION_RULES)}", self.retention)
        expect(
            self.retained_format in RETAINED_FORMATS,
            "retained_format",
            f"one of {', '.join(RETAINED_FORMATS)}",
            self.retained_format,
        )
        expect(0.0 <= self.gamma <= 1.0, "gamma", "a number in [0, 1]", self.gamma)
        expect(0 <= self.retained <= BLOCK_SIZE // 2, "retained", f"0 to {BLOCK_SIZE // 2} tokens", self.retained)
        expect(self.merge != "none" or self.retained == 0, "retained", "0 for merge 'none'", self.retained)
        expect(
            0 <= self.sink_tokens <= self.retained, "sink_tokens", f"0 to retained ({self.retained})", self.sink_tokens
        )

    @property
    def rank(self) -> int:
        """Components of the latent vector."""
        return sum(segment.length for segment in self.segments)

    @property
    def gaussian(self) -> bool:
        """Whether codes are levels of a normal distribution, with one norm per token and head."""
        return any(segment.kind == GAUSSIAN for segment in self.segments)

    @property
    def lossless(self) -> bool:
        """Whether the stored numbers are the layer's own."""
        plain = all(segment.kind == MODEL and segment.transform == "none" for segment in self.segments)
        return self.merge == "none" and plain and not self.align and self.basis == "post_rope"
