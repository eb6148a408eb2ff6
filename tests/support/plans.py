"""Plans every implementation is tested with: the named methods, and combinations no method has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from minicache_trt.compression.methods import MERGING_METHODS, METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import ModelConfig
from tests.support.matrices import random_matrices


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
    segments = (
        Segment(16, "int8"),
        Segment(16, "int4", "channel"),
        Segment(16, "int2", "channel", "hadamard"),
        Segment(d - 48, "model"),
    )
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


def all_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """Named methods, and every option of the codec."""
    return named_plans(config) | {"mixed": mixed_plan(config)} | full_codec_plans(config)


def lossless_plan(config: ModelConfig) -> CompressionPlan:
    """Everything rotated, matched, aligned, merged and transformed back and forth, and nothing lost but rounding."""
    half = config.head_dim // 2
    plain, turned = Segment(half), Segment(half, transform="hadamard")
    options = {"align": True, "match_heads": True}
    return completed(
        config,
        Stream("key", (0, 2), (plain, turned) * 2, merge="linear", basis="pre_rope", **options),  # type: ignore[arg-type]
        Stream("key", (1,), (turned, plain), merge="linear", **options),  # type: ignore[arg-type]
        Stream("key", (3,), (plain, turned), basis="pre_rope", **options),  # type: ignore[arg-type]
        Stream("value", (1, 2, 3), (Segment(3 * config.head_dim),), merge="linear", **options),  # type: ignore[arg-type]
    )


def completed(config: ModelConfig, *streams: Stream, seed: int = 0) -> CompressionPlan:
    """A plan of these streams, uncompressed ones for what they leave out, and random matrices."""
    held = {(stream.part, layer) for stream in streams for layer in stream.layers}
    rest = tuple(
        Stream(part, (layer,), (Segment(config.head_dim),))
        for part in PARTS
        for layer in range(config.num_layers)
        if (part, layer) not in held
    )
    plan = CompressionPlan("custom", streams + rest)
    return replace(plan, matrices=random_matrices(plan, config, seed)).validate(config)


def single_run_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """Streams of one run of 64 or 128 components, for which decode attention has kernels of its own."""
    layers, pairs = [(layer,) for layer in range(config.num_layers)], [(0, 1), (2, 3)]

    def plan(length: int, key: str, value: str, axis: str = "token", basis: str = "post_rope") -> CompressionPlan:
        merge = "none" if length == config.head_dim and basis == "post_rope" else "linear"
        runs = ((Segment(length, format, axis),) for format in (key, value))  # type: ignore[arg-type]
        return _alike(config, *runs, basis, layers if merge == "none" else pairs, merge)

    rank = 192 - config.head_dim
    return {
        "int4": plan(config.head_dim, "int4", "int4"),
        "int4 channels": plan(config.head_dim, "int4", "int4", "channel"),
        "int4 and g4 pairs": plan(rank, "int4", "g4"),
        "g4 and int4 pairs": plan(rank, "g4", "int4"),
        "g4 pairs before RoPE": plan(rank, "g4", "g4", basis="pre_rope"),
        "int4 pairs before RoPE": plan(rank, "int4", "int4", basis="pre_rope"),
        "int4 channels before RoPE": plan(config.head_dim, "int4", "g4", "channel", "pre_rope"),
    }


def several_run_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """Pairs of layers as `calibrate` stores them: runs of a few widths, at most 128 components, nothing else."""
    integers, more = "int8x16 int4x32", "int8x32 int4x48 int2x16"
    levels, others = "g4x32 g3x16 g2x48 g1x16", "g4x16 g3x48 g2x32 g1x32"
    pairs = ((integers, others), (levels, more), (others, levels), ("modelx16 int4x80", integers))
    return _run_plans(config, pairs, ((0, 1), (2, 3)))


def wide_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """All four layers as a group, runs of more than 128 components, nothing else."""
    least, most = "int8x16 int4x48 int2x80", "g4x48 g3x64 g2x96 g1x48"
    pairs = ((least, "int4x176"), (most, least), ("modelx16 int8x128", "int8x32 modelx16"), ("int4x256", most))
    return _run_plans(config, pairs, ((0, 1, 2, 3),))


def _run_plans(
    config: ModelConfig, pairs: Iterable[tuple[str, str]], groups: Sequence[tuple[int, ...]]
) -> dict[str, CompressionPlan]:
    """Streams of these keys and values, keys in either basis."""

    def segments(text: str) -> tuple[Segment, ...]:
        formats = (each.split("x") for each in text.split())
        return tuple(Segment(int(length), name, transform="hadamard") for name, length in formats)  # type: ignore[arg-type]

    return {
        f"{key} | {value} {basis}": _alike(config, segments(key), segments(value), basis, groups)
        for key, value in pairs
        for basis in ("pre_rope", "post_rope")
    }


def channel_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """Pairs of layers with a run whose components have ranges of their own beside runs whose tokens have."""
    runs = (Segment(80, "int4", "channel", "hadamard"), Segment(16, "int8"), Segment(16, "int4"), Segment(16, "int2"))
    back, pairs = runs[::-1], ((0, 1), (2, 3))
    return {
        "ranges of channels and tokens": _alike(config, runs, runs, "post_rope", pairs),
        "ranges of tokens and channels before RoPE": _alike(config, back, back, "pre_rope", pairs),
    }


def _alike(
    config: ModelConfig,
    key: tuple[Segment, ...],
    value: tuple[Segment, ...],
    basis: str,
    groups: Sequence[tuple[int, ...]],
    merge: str = "linear",
) -> CompressionPlan:
    """Every group's keys stored as ``key`` in a basis, its values as ``value``."""
    streams = (
        Stream(part, group, segments, merge=merge, basis=own)  # type: ignore[arg-type]
        for part, segments, own in (("key", key, basis), ("value", value, "post_rope"))
        for group in groups
    )
    return completed(config, *streams)


def run_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """Streams of nothing but runs, for which kernels of their own exist."""
    return single_run_plans(config) | several_run_plans(config) | channel_plans(config) | wide_plans(config)


def full_codec_plans(config: ModelConfig) -> dict[str, CompressionPlan]:
    """Handcrafted plans of four layers and at least 64 components a head; each is a group of options of the codec."""
    assert config.num_layers == 4 and config.head_dim >= 64
    return {
        name: completed(config, *streams, seed=seed)
        for seed, (name, streams) in enumerate({**_linear_streams(config), **_merging_streams(config)}.items())
    }


def _linear_streams(config: ModelConfig) -> dict[str, tuple[Stream, ...]]:
    d = config.head_dim
    g4g2 = (Segment(32, "g4", transform="hadamard"), Segment(64, "g2", transform="hadamard"))
    short = (Segment(16, "g4"), Segment(16, "g2", transform="hadamard"))
    int4drop = (Segment(48, "int4", transform="hadamard"), Segment(32, "drop"), Segment(16, "int8", "channel"))
    # A transform through shared memory, then ranges of columns, which go there too.
    shifted = (Segment(16, "int8"), Segment(32, "int4", transform="hadamard"), Segment(d - 48, "int2", "channel"))
    odd = (Segment(80, "int4", transform="hadamard"), Segment(48, "int4", "channel", "hadamard"))
    return {
        "pair KLT": (
            Stream("key", (0, 1), g4g2, merge="linear"),
            Stream("key", (2, 3), (*g4g2, Segment(16, "drop")), merge="linear", retained=2, norm="token"),
            Stream("value", (1, 2), (Segment(32, "g4"),), merge="linear"),
        ),
        "three layers, dropped segment, retention": (
            Stream("key", (0, 1, 3), int4drop, merge="linear", retained=3, retention="threshold", gamma=0.02),
            Stream("value", (0, 2, 3), int4drop, merge="linear", retained=4, sink_tokens=1, norm="token"),
        ),
        "keys before RoPE": (
            Stream("key", (0,), short, merge="linear", basis="pre_rope"),
            Stream("key", (1, 2), g4g2, merge="linear", basis="pre_rope", retained=2, sink_tokens=2),
            Stream("key", (3,), (Segment(d, "int4", transform="hadamard"),), basis="pre_rope"),
        ),
        "hadamard of odd lengths": (
            Stream("key", (0, 1), odd, merge="linear"),
            Stream("value", (2,), (Segment(48, "int4", transform="hadamard"), Segment(d - 48, transform="hadamard"))),
            Stream("value", (3,), shifted),
        ),
        "aligned KLT": (
            Stream("key", (0, 3), g4g2, merge="linear", align=True, match_heads=True, basis="pre_rope"),
            Stream("value", (0, 3), odd, merge="linear", match_heads=True, retained=1, retained_format="fp8"),
        ),
        "g3": (
            Stream("key", (0, 1), (Segment(48, "g3"), Segment(32, "g3", transform="hadamard")), merge="linear"),
            Stream("value", (1,), (Segment(d, "g3", transform="hadamard"),)),
        ),
        "g1": (
            Stream("key", (2, 3), (Segment(16, "g4"), Segment(80, "g1", transform="hadamard")), merge="linear"),
            Stream("value", (0, 1), (Segment(d, "g1", transform="hadamard"),), merge="mean", retained=2),
        ),
    }


def _merging_streams(config: ModelConfig) -> dict[str, tuple[Stream, ...]]:
    d = config.head_dim
    int4, int8, fp8 = ((Segment(d, name),) for name in ("int4", "int8", "fp8"))
    channels = (Segment(d, "fp8", "channel"),)
    literal = Stream("key", (0, 1), channels, merge="slerp", retained=5, retention="paper_literal", gamma=0.1)
    matched = Stream(
        "key",
        (0, 2),
        (Segment(d, "int4", "channel"),),
        merge="slerp",
        align=True,
        match_heads=True,
        retained=6,
        retention="threshold",
        gamma=0.2,
        retained_format="int8",
        sink_tokens=3,
    )
    return {
        "three layers with residuals": (
            Stream("key", (0, 1, 2), int4, merge="slerp", residual="int2", t=0.4),
            Stream("value", (1, 2, 3), int8, merge="slerp", residual="int4", norm="token", retained=2),
            Stream("value", (0,), (Segment(d, transform="hadamard"),)),
        ),
        "aligned, matched, threshold": (
            matched,
            replace(matched, part="value", layers=(1, 3), residual="int8", retained_format="int4"),
            Stream("key", (1,), int8, align=True, match_heads=True),
        ),
        "mean of four": (
            Stream("key", (0, 1, 2, 3), int4, merge="mean", align=True, basis="pre_rope", retained=4),
            Stream("value", (0, 1, 2, 3), int8, merge="mean", norm="token", retained=3, retained_format="fp8"),
        ),
        "fp8": (
            Stream("key", (0,), channels),
            Stream("key", (1, 2, 3), channels, merge="slerp", retained=4, retained_format="fp8", sink_tokens=2),
            Stream("value", (0,), fp8),
            Stream("value", (1, 2), (Segment(d, "fp8", transform="hadamard"),), merge="slerp"),
        ),
        "paper_literal": (
            literal,
            replace(literal, part="value", segments=int4, merge="mean", norm="token", sink_tokens=2),
        ),
    }
