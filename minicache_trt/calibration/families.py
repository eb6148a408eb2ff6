"""What a stream can be: for each group of layers and basis, the ways to store it worth considering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from minicache_trt.calibration.allocation import RUN, Allocation, gaussian_allocations, minmax_allocations
from minicache_trt.calibration.klt import JointTransform, joint_transform
from minicache_trt.calibration.knapsack import Option, fewest_bytes
from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.rotary import average_mean, average_moment
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.compression.matrices import required
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.size import BASELINE_BYTES
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import ModelConfig
from minicache_trt.contract import stream_layout

Constants = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Candidate:
    """One way to store a group.

    Parameters
    ----------
    stream : Stream
    block_bytes : int
        Bytes of one block of the group.
    expected : float
        Loss by the second-order estimate.
    """

    stream: Stream
    block_bytes: int
    expected: float

    @property
    def key(self) -> str:
        """Name in files and tables, different for different streams."""
        stream = self.stream
        segments = "+".join(f"{segment.format}x{segment.length}" for segment in stream.segments)
        layers = "-".join(map(str, stream.layers))
        return f"{stream.part} {layers} {stream.basis} {segments}{' sink' if stream.retained else ''}"


@dataclass(frozen=True)
class Family:
    """A group of consecutive layers' keys or values in one basis: its transform and the candidates that use it."""

    part: str
    layers: tuple[int, ...]
    basis: str
    moments: Moments
    config: ModelConfig
    damping: float
    positions: int

    @property
    def name(self) -> str:
        return f"{self.part} {'-'.join(map(str, self.layers))} {self.basis}"

    @cached_property
    def head_map(self) -> NDArray[np.int64]:
        """``[m, H]``: KV head of each layer in each slot; slot h holds head h of the first layer."""
        own = self.moments.head_map[PARTS.index(self.part), list(self.layers)]
        result: NDArray[np.int64] = own[:, self._order]
        return result

    @property
    def _order(self) -> NDArray[np.int64]:
        """Chain of matched heads of each slot."""
        return np.argsort(self.moments.head_map[PARTS.index(self.part), self.layers[0]])

    @cached_property
    def transform(self) -> JointTransform:
        """The group's joint transform, per slot."""
        part, moments = PARTS.index(self.part), self.moments
        second = moments.group(moments.second, part, self.layers) / moments.weight
        gradient = moments.group(moments.gradient, part, self.layers) / moments.gradient_weight
        mean = moments.group_mean(part, self.layers)
        if self.part == "key" and self.basis == "post_rope":
            config = self.config.at_layer(self.layers[0])
            second = average_moment(config, second, self.positions)
            gradient = average_moment(config, gradient, self.positions)
            parts = np.split(mean, len(self.layers), -1)
            mean = np.concatenate([average_mean(config, each, self.positions) for each in parts], -1)
        order = self._order
        return joint_transform(second[order], mean[order], gradient[order], self.damping)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Those that no other beats in both bytes and expected loss, the smallest first."""
        cost = self.transform.cost.sum(0)
        found = [self._candidate(each) for each in (*gaussian_allocations(cost), *minmax_allocations(cost))]
        if len(self.layers) == 1 and self.basis == "post_rope":
            exact = Stream(self.part, self.layers, (Segment(self.config.head_dim),))
            found.append(Candidate(exact, block_bytes(exact, self.config), 0.0))
        found.sort(key=lambda each: (each.block_bytes, each.expected))
        kept: list[Candidate] = []
        for each in found:
            if not kept or each.expected < kept[-1].expected:
                kept.append(each)
        return kept

    def _candidate(self, allocation: Allocation) -> Candidate:
        matched = bool((self.head_map != np.arange(self.config.num_kv_heads)).any())
        stream = Stream(
            self.part, self.layers, allocation.segments, merge="linear", basis=self.basis, match_heads=matched
        )
        return Candidate(stream, block_bytes(stream, self.config), allocation.expected)

    def constants(self, stream: Stream) -> Constants:
        """A candidate's matrices."""
        if stream.merge == "none":
            return {}
        result = self.transform.constants(stream.rank, stream.gaussian)
        if stream.match_heads:
            result["head_map"] = self.head_map.astype(np.int32)
        assert result.keys() == required(stream, self.config).keys()
        return result


def with_sink(candidate: Candidate, config: ModelConfig) -> Candidate:
    """The candidate with one retained token per block, where it is a linear stream."""
    if candidate.stream.merge != "linear":
        return candidate
    stream = replace(candidate.stream, retained=1, sink_tokens=1, retained_format="int8")
    return Candidate(stream, block_bytes(stream, config), candidate.expected)


def smallest_block_bytes(config: ModelConfig, settings: CalibrationSettings) -> int:
    """Bytes per block of the smallest plan these settings allow, of any model of this shape."""
    segments = (Segment(RUN, "g1", transform="hadamard"),)
    options = []
    for chain, part in enumerate(PARTS):
        for layers in _groups(config, settings):
            stream = Stream(part, layers, segments, merge="linear")
            options.append(Option(chain, layers[0], len(layers), block_bytes(stream, config), 0.0))
    return fewest_bytes(options, config.num_layers)


def _groups(config: ModelConfig, settings: CalibrationSettings) -> Iterator[tuple[int, ...]]:
    """Consecutive layers that rotate their keys alike, so that there is one mean over positions."""
    for size in settings.group_sizes:
        for start in range(config.num_layers - size + 1):
            layers = tuple(range(start, start + size))
            if len({config.rope_at(layer) for layer in layers}) == 1:
                yield layers


def block_bytes(stream: Stream, config: ModelConfig) -> int:
    """Bytes of one compressed block of a stream."""
    return sum(pool.block_bytes(BASELINE_BYTES) for pool in stream_layout(0, stream, config).pools.values())


def families(moments: Moments, config: ModelConfig, settings: CalibrationSettings, positions: int) -> Iterator[Family]:
    """All groups of consecutive layers of the sizes asked for, keys in each basis that is allowed."""
    for part in PARTS:
        bases = ["post_rope"]
        if part == "key" and settings.read_cost == "any" and config.rotary_dim == config.head_dim:
            bases.append("pre_rope")
        for layers in _groups(config, settings):
            for basis in bases:
                yield Family(part, layers, basis, moments, config, settings.damping, positions)
