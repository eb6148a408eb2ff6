"""Compression plans: which keys and values share storage, and in which format.

A *stream* is the keys or the values of one group of layers; a *plan* is the list of streams. Every layer's attention
reads one key stream and one value stream. A plan without streams keeps everything exact (method ``full``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.errors import UserError

PARTS = ("key", "value")
MERGES = ("none", "mean", "slerp")
FORMAT_BITS: dict[str, int | None] = {"model": None, "int8": 8, "int4": 4, "int2": 2}
"""Storage formats of a segment; ``model`` is the engine's compute type (None: no code bits)."""
AXES = ("token", "channel")
NORMS = ("head", "token")
RETENTION_RULES = ("topk",)


def _expect(condition: bool, field: str, expected: str, got: object) -> None:
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
        A key of ``FORMAT_BITS``.
    axis : str
        Where a range (scale and minimum) is shared: ``token`` (all components of one token and head) or ``channel``
        (one component over a block, KIVI's scheme for keys). Ignored by ``model``.
    """

    length: int
    format: str = "model"
    axis: str = "token"

    def __post_init__(self) -> None:
        _expect(self.length > 0 and self.length % 16 == 0, "length", "a positive multiple of 16", self.length)
        _expect(self.format in FORMAT_BITS, "format", f"one of {', '.join(FORMAT_BITS)}", self.format)
        _expect(self.axis in AXES, "axis", f"one of {', '.join(AXES)}", self.axis)

    @property
    def bits(self) -> int | None:
        """Bits of one code, None for ``model``."""
        return FORMAT_BITS[self.format]


@dataclass(frozen=True)
class Stream:
    """Keys or values of one group of layers.

    Parameters
    ----------
    part : str
        ``key`` (after RoPE) or ``value``.
    layers : tuple of int
        The group, ascending. ``none`` takes one layer, ``mean`` and ``slerp`` two.
    segments : tuple of Segment
        Storage of the latent vector, whose length is head_dim for these merges.
    merge : str
        ``none`` | ``mean`` (arithmetic mean) | ``slerp`` (spherical interpolation of directions plus one norm per
        layer; arXiv 2405.14366 section 3.2).
    t : float
        Interpolation weight of the later layer (``slerp``), in [0, 1].
    norm : str
        Granularity of magnitude, direction and retention: ``head`` (per token and KV head) or ``token`` (one vector
        over all heads, as in the paper).
    retained : int
        Tokens per block (and head, for ``norm="head"``) stored exactly, R = round(gamma * block_size).
    retention : str
        ``topk``: the R most distant tokens of each block. Deviates from the printed formula of the paper, which keeps
        the closest, and follows its text.
    sink_tokens : int
        First positions of the sequence always retained, at most ``retained``.
    """

    part: str
    layers: tuple[int, ...]
    segments: tuple[Segment, ...]
    merge: str = "none"
    t: float = 0.6
    norm: str = "head"
    retained: int = 0
    retention: str = "topk"
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        _expect(self.part in PARTS, "part", f"one of {', '.join(PARTS)}", self.part)
        _expect(self.merge in MERGES, "merge", f"one of {', '.join(MERGES)}", self.merge)
        size = 1 if self.merge == "none" else 2
        _expect(len(self.layers) == size, "layers", f"{size} layer(s) for merge {self.merge!r}", list(self.layers))
        _expect(
            list(self.layers) == sorted(set(self.layers)), "layers", "ascending, distinct layers", list(self.layers)
        )
        _expect(1 <= len(self.segments) <= 4, "segments", "1 to 4 segments", len(self.segments))
        _expect(0.0 <= self.t <= 1.0, "t", "a number in [0, 1]", self.t)
        _expect(self.norm in NORMS, "norm", f"one of {', '.join(NORMS)}", self.norm)
        _expect(self.retention in RETENTION_RULES, "retention", f"one of {', '.join(RETENTION_RULES)}", self.retention)
        _expect(0 <= self.retained <= BLOCK_SIZE // 2, "retained", f"0 to {BLOCK_SIZE // 2} tokens", self.retained)
        _expect(self.merge != "none" or self.retained == 0, "retained", "0 for merge 'none'", self.retained)
        _expect(
            0 <= self.sink_tokens <= self.retained, "sink_tokens", f"0 to retained ({self.retained})", self.sink_tokens
        )

    @property
    def rank(self) -> int:
        """Components of the latent vector."""
        return sum(segment.length for segment in self.segments)

    @property
    def lossless(self) -> bool:
        return self.merge == "none" and all(segment.bits is None for segment in self.segments)


@dataclass(frozen=True)
class CompressionPlan:
    """All streams of a model, or none at all (method ``full``).

    Parameters
    ----------
    method : str
        Name for tables; a key of ``METHODS`` or ``custom``.
    streams : tuple of Stream
        Each (part, layer) exactly once, or empty.
    """

    method: str
    streams: tuple[Stream, ...] = ()

    @property
    def compresses(self) -> bool:
        """Whether the engine has a compressed tier at all."""
        return bool(self.streams)

    def find(self, part: str, layer: int) -> tuple[int, int]:
        """Index of the stream that holds ``part`` of ``layer``, and the layer's place within its group."""
        for index, stream in enumerate(self.streams):
            if stream.part == part and layer in stream.layers:
                return index, stream.layers.index(layer)
        raise KeyError(f"no stream holds {part} of layer {layer}")

    def validate(self, config: ModelConfig) -> CompressionPlan:
        """Check the plan against a model.

        Raises
        ------
        UserError
            Naming the stream and field that do not fit.
        """
        owner: dict[tuple[str, int], int] = {}
        for index, stream in enumerate(self.streams):
            if stream.rank != config.head_dim:
                raise UserError(
                    f"plan: streams[{index}].segments: lengths add up to {stream.rank}, "
                    f"expected head_dim {config.head_dim}"
                )
            for layer in stream.layers:
                if not 0 <= layer < config.num_layers:
                    raise UserError(
                        f"plan: streams[{index}].layers: layer {layer} does not exist, the model has layers 0 to "
                        f"{config.num_layers - 1}"
                    )
                first = owner.setdefault((stream.part, layer), index)
                if first != index:
                    raise UserError(
                        f"plan: the {stream.part}s of layer {layer} are in streams[{first}] and in streams[{index}]",
                        "name each layer once per part",
                    )
        missing = [
            f"{part} {layer}" for part in PARTS for layer in range(config.num_layers) if (part, layer) not in owner
        ]
        if self.streams and missing:
            raise UserError(
                f"plan: no stream holds {', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}",
                "give each layer one key and one value stream (merge 'none', format 'model' keeps it as it is)",
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
