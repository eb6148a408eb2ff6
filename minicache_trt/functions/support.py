"""What the ONNX functions compute of the plan vocabulary."""

from __future__ import annotations

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream

FORMATS = ("model", "int8", "int4", "int2")


def unsupported(plan: CompressionPlan) -> str | None:
    """The first stream option of a plan that only the PyTorch twin computes, as ``streams[3].merge 'linear'``."""
    for index, stream in enumerate(plan.streams):
        for field, supported in _stream_checks(stream).items():
            if not supported:
                return f"streams[{index}].{field} {getattr(stream, field)!r}"
        for place, segment in enumerate(stream.segments):
            for field, supported in _segment_checks(segment).items():
                if not supported:
                    return f"streams[{index}].segments[{place}].{field} {getattr(segment, field)!r}"
    return None


def _stream_checks(stream: Stream) -> dict[str, bool]:
    return {
        "merge": stream.merge != "linear",
        "layers": len(stream.layers) <= 2,
        "basis": stream.basis == "post_rope",
        "align": not stream.align,
        "match_heads": not stream.match_heads,
        "retention": stream.retention == "topk" or not stream.retained,
        "retained_format": stream.retained_format == "model" or not stream.retained,
        "residual": stream.residual == "none",
    }


def _segment_checks(segment: Segment) -> dict[str, bool]:
    return {"format": segment.format in FORMATS, "transform": segment.transform == "none"}
