"""Stream descriptors: what kernels, plugins and custom operators are told of a stream, as plain numbers.

The reader is ``plugins/include/minicache/descriptor.h``, which documents the fields; it derives sizes and offsets by
the rules of `minicache_trt.contract.stream_layout`, and tests hold the two together.
"""

from __future__ import annotations

from minicache_trt.compression.segment import AXES, FORMATS, TRANSFORMS
from minicache_trt.compression.stream import BASES, MERGES, NORMS, PARTS, RETENTION_RULES
from minicache_trt.contract import StreamLayout

DESCRIPTOR_VERSION = 1
_FORMATS = tuple(FORMATS)


def stream_descriptor(layout: StreamLayout, member: int = 0) -> list[int]:
    """Integers that describe a stream to the reader of its layer number ``member``, or to its compressor."""
    stream = layout.stream
    result = [
        DESCRIPTOR_VERSION,
        PARTS.index(stream.part),
        MERGES.index(stream.merge),
        BASES.index(stream.basis),
        NORMS.index(stream.norm),
        len(stream.layers),
        member,
        stream.retained,
        RETENTION_RULES.index(stream.retention),
        stream.sink_tokens,
        _FORMATS.index(stream.retained_format),
        _FORMATS.index("drop" if stream.residual == "none" else stream.residual),
        int(stream.align),
        int(stream.match_heads),
        len(stream.segments),
    ]
    for segment in stream.segments:
        axis, transform = AXES.index(segment.axis), TRANSFORMS.index(segment.transform)
        result += [segment.length, _FORMATS.index(segment.format), axis, transform]
    return result


def stream_numbers(layout: StreamLayout) -> list[float]:
    """The floats that go with `stream_descriptor`."""
    return [layout.stream.t, layout.stream.gamma]
