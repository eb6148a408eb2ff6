"""Hypothesis strategies of valid streams."""

from __future__ import annotations

from hypothesis import strategies as st

from minicache_trt.compression.segment import AXES, FORMATS, GAUSSIAN, TRANSFORMS, Segment
from minicache_trt.compression.stream import (
    BASES,
    MAX_RANK,
    MERGES,
    NORMS,
    PARTS,
    RESIDUAL_FORMATS,
    RETAINED_FORMATS,
    RETENTION_RULES,
    Stream,
)
from minicache_trt.config import ModelConfig

GAUSSIAN_FORMATS = sorted(name for name, fmt in FORMATS.items() if fmt.kind == GAUSSIAN)
OTHER_FORMATS = sorted(set(FORMATS) - {*GAUSSIAN_FORMATS, "drop"})


@st.composite
def segments(draw: st.DrawFn, rank: int, gaussian: bool) -> tuple[Segment, ...]:
    """One to four segments of ``rank`` components, a multiple of 16."""
    units = rank // 16
    cuts = draw(st.lists(st.integers(1, units - 1), max_size=3, unique=True).map(sorted)) if units > 1 else []
    lengths = [16 * (b - a) for a, b in zip([0, *cuts], [*cuts, units], strict=True)]
    stored = draw(st.integers(0, len(lengths) - 1))
    result = []
    for place, length in enumerate(lengths):
        names = GAUSSIAN_FORMATS if gaussian else OTHER_FORMATS
        fmt = draw(st.sampled_from(names if place == stored else [*names, "drop"]))
        result.append(Segment(length, fmt, draw(st.sampled_from(AXES)), draw(st.sampled_from(TRANSFORMS))))
    return tuple(result)


@st.composite
def streams(draw: st.DrawFn, config: ModelConfig) -> Stream:
    """Any stream that a plan for ``config`` may hold."""
    part, merge = draw(st.sampled_from(PARTS)), draw(st.sampled_from(MERGES))
    fewest, most = {"none": (1, 1), "linear": (1, config.num_layers)}.get(merge, (2, config.num_layers))
    layers = draw(st.lists(st.integers(0, config.num_layers - 1), min_size=fewest, max_size=most, unique=True))
    rank = config.head_dim
    if merge == "linear":
        rank = 16 * draw(st.integers(1, min(MAX_RANK, len(layers) * config.head_dim) // 16))
    retained = 0 if merge == "none" else draw(st.integers(0, 8))
    return Stream(
        part,
        tuple(sorted(layers)),
        draw(segments(rank, merge != "slerp" and draw(st.booleans()))),
        merge=merge,
        basis=draw(st.sampled_from(BASES)) if part == "key" else "post_rope",
        align=draw(st.booleans()),
        match_heads=draw(st.booleans()),
        t=draw(st.floats(0.0, 1.0)),
        norm=draw(st.sampled_from(NORMS)),
        retained=retained,
        retention=draw(st.sampled_from(RETENTION_RULES)),
        gamma=draw(st.floats(0.0, 1.0)),
        sink_tokens=draw(st.integers(0, retained)),
        retained_format=draw(st.sampled_from(RETAINED_FORMATS)),
        residual=draw(st.sampled_from(RESIDUAL_FORMATS)) if merge == "slerp" else "none",
    )
