"""How alike the keys and values of neighbouring layers are: what merging in depth relies on.

Liu et al., *MiniCache: KV Cache Compression in Depth Dimension for Large Language Models*, arXiv 2405.14366, Figure 2
and section 3: states of adjacent layers are alike in direction from the middle of the network on, and differ in norm.
A pair at angle Omega that is merged into one direction costs each layer a relative error of about sin(Omega / 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import PARTS
from minicache_trt.tracing.points import Trace

BIN_DEGREES = 3
"""Width of a bin of an angle histogram; 60 bins cover 0 to 180 degrees."""


@dataclass(frozen=True)
class Spread:
    """Mean and 10th, 50th and 90th percentile over all tokens (and heads)."""

    mean: float
    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Spread:
        p10, p50, p90 = np.percentile(values, (10, 50, 90))
        return cls(float(values.mean()), float(p10), float(p50), float(p90))


@dataclass(frozen=True)
class LayerNorms:
    """Norms of one layer's keys or values."""

    part: str
    layer: int
    norm: Spread


@dataclass(frozen=True)
class PairSimilarity:
    """Directions of two layers' keys or values, token by token.

    Parameters
    ----------
    part : str
        ``key`` (after RoPE) or ``value``.
    layers : (int, int)
    merged : bool
        Whether the engine's plan stores the two as one stream.
    cosine : Spread
        A vector of zeros has cosine 0 with everything.
    angle : Spread
        Degrees.
    histogram : tuple of int
        Counts of angles in bins of `BIN_DEGREES` from 0 to 180 degrees.
    """

    part: str
    layers: tuple[int, int]
    merged: bool
    cosine: Spread
    angle: Spread
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class StreamStatistics:
    """Everything measured on some prompts.

    Parameters
    ----------
    tokens : int
    granularity : dict
        Part to ``head`` (one vector per token and KV head) or ``token`` (one over all heads): as the plan merges it,
        ``head`` where it merges nothing.
    norms : tuple of LayerNorms
    pairs : tuple of PairSimilarity
        All adjacent layers, and neighbours within the groups the plan merges.
    """

    tokens: int
    granularity: dict[str, str]
    norms: tuple[LayerNorms, ...]
    pairs: tuple[PairSimilarity, ...]

    def of(self, part: str) -> tuple[list[LayerNorms], list[PairSimilarity]]:
        """Those of ``key`` or ``value``."""
        return [row for row in self.norms if row.part == part], [row for row in self.pairs if row.part == part]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "angle_bin_degrees": BIN_DEGREES}


def stream_statistics(traces: Sequence[Trace], plan: CompressionPlan, num_layers: int) -> StreamStatistics:
    """Measure recorded keys and values.

    Parameters
    ----------
    traces : sequence of Trace
        ``kv.<layer>`` ``[tokens, 2, H, D]`` for each prompt; see `minicache_trt.tracing.recording.keys_and_values`.
    plan : CompressionPlan
        Says which layers are merged, and at which granularity.
    num_layers : int
    """
    norms: list[LayerNorms] = []
    pairs: list[PairSimilarity] = []
    granularity = {}
    for place, part in enumerate(PARTS):
        merged = {
            pair: stream.norm for stream in plan.streams if stream.part == part for pair in pairwise(stream.layers)
        }
        granularity[part] = "token" if "token" in merged.values() else "head"
        vectors = [_vectors(traces, layer, place, granularity[part]) for layer in range(num_layers)]
        norms += [LayerNorms(part, layer, Spread.of(np.linalg.norm(x, axis=-1))) for layer, x in enumerate(vectors)]
        adjacent = {(layer, layer + 1) for layer in range(num_layers - 1)}
        for a, b in sorted(adjacent | merged.keys()):
            pairs.append(compare_vectors(part, (a, b), (a, b) in merged, vectors[a], vectors[b]))
    return StreamStatistics(sum(len(trace["kv.0"]) for trace in traces), granularity, tuple(norms), tuple(pairs))


def _vectors(traces: Sequence[Trace], layer: int, place: int, granularity: str) -> NDArray[np.float64]:
    """Keys (``place`` 0) or values (1), ``[vectors, components]``."""
    x = np.concatenate([trace[f"kv.{layer}"][:, place] for trace in traces]).astype(np.float64)
    return x.reshape(len(x), -1) if granularity == "token" else x.reshape(-1, x.shape[-1])


def compare_vectors(
    part: str, layers: tuple[int, int], merged: bool, a: NDArray[np.float64], b: NDArray[np.float64]
) -> PairSimilarity:
    """Compare vectors ``[vectors, components]`` of two layers, row by row."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.clip((a * b).sum(-1) / np.where(lengths == 0, 1, lengths), -1, 1)
    angle = np.degrees(np.arccos(cosine))
    counts, _ = np.histogram(angle, bins=180 // BIN_DEGREES, range=(0, 180))
    return PairSimilarity(part, layers, merged, Spread.of(cosine), Spread.of(angle), tuple(map(int, counts)))
