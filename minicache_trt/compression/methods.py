"""Compression methods by name, each a function from a model's shape to a plan."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.smoothquant import unit_scales, with_scales
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.errors import UserError


@dataclass(frozen=True)
class MethodOptions:
    """Settings of the merging methods; the defaults are the paper's (arXiv 2405.14366 section 4).

    Parameters
    ----------
    merge_start : int, optional
        First merged layer S, in [0, num_layers - 2]; default num_layers // 2 (0 for two layers).
    t : float
        SLERP weight of the later layer.
    gamma : float
        Share of each block's tokens retained exactly.
    norm : str
        ``head`` or ``token``, see `Stream`.
    sink_tokens : int
        First positions always retained (counted within the gamma share).
    kv_format : str, optional
        ``int8``, ``int4`` or ``int2``: `mean` and `minicache` store merged and single layers in KIVI's scheme at that
        width instead of the model's 16 bits.
    """

    merge_start: int | None = None
    t: float = 0.6
    gamma: float = 0.05
    norm: str = "head"
    sink_tokens: int = 0
    kv_format: str | None = None


Formats = dict[str, Segment]
"""Segment of each part: keys ``key`` and ``value``."""


def _chosen(config: ModelConfig, options: MethodOptions) -> Formats:
    if options.kv_format is None or options.kv_format == "model":
        segment = Segment(config.head_dim, "model")
        return {"key": segment, "value": segment}
    return _kivi(config, options.kv_format)


def _kivi(config: ModelConfig, fmt: str) -> Formats:
    """KIVI's scheme: keys per channel over a block, values per token (arXiv 2402.02750)."""
    return {"key": Segment(config.head_dim, fmt, "channel"), "value": Segment(config.head_dim, fmt, "token")}


def _per_token(config: ModelConfig, fmt: str, transform: str = "none") -> Formats:
    segment = Segment(config.head_dim, fmt, "token", transform)
    return {"key": segment, "value": segment}


def _groups(config: ModelConfig, start: int) -> Iterator[tuple[int, ...]]:
    yield from ((layer,) for layer in range(start))
    for layer in range(start, config.num_layers, 2):
        yield (layer, layer + 1) if layer + 1 < config.num_layers else (layer,)


def _streams(config: ModelConfig, merge: str, formats: Formats, options: MethodOptions) -> tuple[Stream, ...]:
    merging = merge != "none"
    start = config.num_layers if not merging else _merge_start(config, options)
    streams = []
    for layers in _groups(config, start):
        for part, segment in formats.items():
            if len(layers) == 1:
                streams.append(Stream(part, layers, (segment,)))
            else:
                streams.append(
                    Stream(
                        part,
                        layers,
                        (segment,),
                        merge=merge,
                        t=options.t,
                        norm=options.norm,
                        retained=round(options.gamma * BLOCK_SIZE),
                        sink_tokens=options.sink_tokens,
                    )
                )
    return tuple(streams)


def _merge_start(config: ModelConfig, options: MethodOptions) -> int:
    middle = min(config.num_layers // 2, config.num_layers - 2)
    start = middle if options.merge_start is None else options.merge_start
    if config.num_layers < 2:
        raise UserError("the model has one layer, so there is nothing to merge", "choose a method that does not merge")
    if not 0 <= start <= config.num_layers - 2:
        raise UserError(
            f"merge start {start} is out of range: the model has {config.num_layers} layers",
            f"choose a layer from 0 to {config.num_layers - 2}",
        )
    return start


def full(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """No compression."""
    return ()


def mean(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """Arithmetic mean of adjacent layers from the merge start on."""
    return _streams(config, "mean", _chosen(config, options), options)


def kivi4(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """4-bit KIVI on every layer, no merging (arXiv 2402.02750)."""
    return _streams(config, "none", _kivi(config, "int4"), options)


def kivi2(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """2-bit KIVI on every layer, no merging (arXiv 2402.02750)."""
    return _streams(config, "none", _kivi(config, "int2"), options)


def rtn(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """Round to nearest: 4 bits per token for keys and values, no merging."""
    return _streams(config, "none", _per_token(config, "int4"), options)


def hadamard4(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """`rtn` after a Walsh-Hadamard transform of every head (QuaRot, arXiv 2404.00456, of the cache only)."""
    return _streams(config, "none", _per_token(config, "int4", "hadamard"), options)


def hadamard2(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """`hadamard4` in 2 bits."""
    return _streams(config, "none", _per_token(config, "int2", "hadamard"), options)


def smoothquant(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """8 bits per token; keys are divided by a calibrated scale per channel first (arXiv 2211.10438)."""
    return tuple(
        dataclasses.replace(stream, merge="linear") if stream.part == "key" else stream
        for stream in _streams(config, "none", _per_token(config, "int8"), options)
    )


def minicache(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """The paper's plan with 16-bit directions (arXiv 2405.14366)."""
    return _streams(config, "slerp", _chosen(config, options), options)


def minicache4(config: ModelConfig, options: MethodOptions) -> tuple[Stream, ...]:
    """The paper's plan with 4-bit KIVI on the directions and on the single layers."""
    return _streams(config, "slerp", _kivi(config, "int4"), options)


METHODS: dict[str, Callable[[ModelConfig, MethodOptions], tuple[Stream, ...]]] = {
    method.__name__: method
    for method in (full, rtn, hadamard4, hadamard2, smoothquant, kivi4, kivi2, mean, minicache, minicache4)
}
MERGING_METHODS = ("mean", "minicache", "minicache4")
FORMATTED_METHODS = ("mean", "minicache")
"""Methods that take a ``kv_format``; the others fix it."""
CALIBRATED_METHODS = ("smoothquant",)
"""Methods with constants that depend on the checkpoint; see `minicache_trt.compression.smoothquant`."""
DEFAULT_METHOD = "kivi4"
"""The method with the least measured loss; merging raw layers is the user's choice, not ours (README, Results)."""


def make_plan(config: ModelConfig, method: str, options: MethodOptions | None = None) -> CompressionPlan:
    """Plan of a named method for a model.

    A calibrated method's constants are those of no calibration (scales of 1): they have the right size.

    Raises
    ------
    UserError
        Unknown method, an option out of range, or a merge start given to a method that merges nothing.
    """
    options = options or MethodOptions()
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=1)
        raise UserError(
            f"unknown method {method!r}" + (f", did you mean {close[0]!r}?" if close else ""),
            f"methods: {', '.join(METHODS)}",
        )
    merging = {f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default} - {"kv_format"}
    if merging and method not in MERGING_METHODS:
        raise UserError(
            f"method {method!r} merges no layers, so it takes no {', '.join(sorted(merging)).replace('_', '-')}",
            f"methods that merge: {', '.join(MERGING_METHODS)}",
        )
    if options.kv_format is not None and method not in FORMATTED_METHODS:
        raise UserError(
            f"method {method!r} fixes its format, so it takes no --kv-format",
            f"methods that take one: {', '.join(FORMATTED_METHODS)}",
        )
    if not 0.0 <= options.gamma <= 0.5:
        raise UserError(f"gamma: expected a number in [0, 0.5], got {options.gamma}")
    try:
        plan = CompressionPlan(method, METHODS[method](config, options))
        if method in CALIBRATED_METHODS:
            plan = with_scales(plan, unit_scales(config))
        return plan.validate(config)
    except ValueError as error:
        raise UserError(str(error)) from error
