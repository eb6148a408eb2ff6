"""Plans every implementation is tested with: the named methods, and combinations no method has."""

from __future__ import annotations

from minicache_trt.compression.methods import MERGING_METHODS, METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig


def named_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """Every named method that compresses, with default options and with the paper's norm granularity and sinks."""
    plans = {name: make_plan(config, name) for name in METHODS if name != "full"}
    for name in MERGING_METHODS:
        options = MethodOptions(merge_start=1, t=0.4, gamma=0.1, norm="token", sink_tokens=3)
        plans[f"{name}-token"] = make_plan(config, name, options)
    return plans


def mixed_plan(config: ModelConfig) -> CompressionPlan:
    """Two layers, every format, both axes, segments of different formats, and distant layers in one group."""
    assert config.num_layers == 4 and config.head_dim >= 64
    d = config.head_dim
    segments = (Segment(16, "int8"), Segment(16, "int4", "channel"), Segment(16, "int2"), Segment(d - 48, "model"))
    return CompressionPlan(
        "custom",
        (
            Stream("key", (0, 3), segments, merge="slerp", retained=2, sink_tokens=2),
            Stream("key", (1,), segments[::-1]),
            Stream("key", (2,), (Segment(d, "int8", "channel"),)),
            Stream("value", (0, 1), segments, merge="mean", norm="token", retained=4, sink_tokens=1),
            Stream("value", (2, 3), (Segment(d, "int2", "channel"),), merge="slerp", norm="token", retained=1),
        ),
    ).validate(config)
