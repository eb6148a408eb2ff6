"""Compression plans: which keys and values share storage, and in which format.

A *stream* is the keys or the values of one group of layers; a *plan* is the list of streams. Every layer's attention
reads one key stream and one value stream. A plan without streams keeps everything exact (method ``full``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from minicache_trt.compression.matrices import Matrices, check_matrices
from minicache_trt.compression.stream import PARTS, Stream
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError


@dataclass(frozen=True)
class CompressionPlan:
    """All streams of a model, or none at all (method ``full``).

    Parameters
    ----------
    method : str
        Name for tables; a key of ``METHODS`` or ``custom``.
    streams : tuple of Stream
        Each (part, layer) exactly once, or empty.
    matrices : mapping
        Calibrated constants by ``streams.<i>.<name>``; see `minicache_trt.compression.matrices`.
    calibrated_on : str, optional
        Checksum of the checkpoint the constants were computed from; no other takes the plan.
    """

    method: str
    streams: tuple[Stream, ...] = ()
    matrices: Matrices = field(default_factory=dict, compare=False, repr=False)
    calibrated_on: str | None = None

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
            _check_rank(index, stream, config)
            if stream.basis == "pre_rope" and config.rotary_dim != config.head_dim:
                raise UserError(
                    f"plan: streams[{index}].basis: 'pre_rope' needs a model that rotates whole heads, this one "
                    f"rotates {config.rotary_dim} of {config.head_dim} components",
                    "use basis 'post_rope'",
                )
            _check_rotation(index, stream, config)
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
            check_matrices(self.matrices, index, stream, config)
        self._check_complete(config, owner)
        return self

    def _check_complete(self, config: ModelConfig, owner: dict[tuple[str, int], int]) -> None:
        missing = [
            f"{part} {layer}" for part in PARTS for layer in range(config.num_layers) if (part, layer) not in owner
        ]
        if self.streams and missing:
            raise UserError(
                f"plan: no stream holds {', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}",
                "give each layer one key and one value stream (merge 'none', format 'model' keeps it as it is)",
            )
        known = {f"streams.{index}." for index in range(len(self.streams))}
        stray = [name for name in self.matrices if not any(name.startswith(prefix) for prefix in known)]
        if stray:
            raise UserError(f"plan: tensor {stray[0]} belongs to no stream of the plan")

    def to_dict(self) -> dict[str, Any]:
        """The plan without its matrices, as plan.json and an engine's config.json hold it."""
        source = {} if self.calibrated_on is None else {"calibrated_on": self.calibrated_on}
        streams = [dataclasses.asdict(stream) for stream in self.streams]
        return {"method": self.method, **source, "streams": streams}

    def check_source(self, checksum: str) -> None:
        """Refuse a checkpoint whose checksum is not the one the plan was calibrated on.

        Raises
        ------
        UserError
        """
        if self.calibrated_on not in (None, checksum):
            raise UserError(
                "plan: it was calibrated on another checkpoint than this one (other weights, or another config.json)",
                "calibrate this checkpoint, or use that one",
            )


def _check_rotation(index: int, stream: Stream, config: ModelConfig) -> None:
    if stream.basis == "pre_rope" and config.local_rope is not None:
        whole = [layer for layer in stream.layers if layer in config.full_layers]
        if 0 < len(whole) < len(stream.layers):
            raise UserError(
                f"plan: streams[{index}].basis: 'pre_rope' needs layers with the same RoPE, layers "
                f"{', '.join(map(str, whole))} have another than the rest of {', '.join(map(str, stream.layers))}",
                "group layers that have a sliding window, and those that have none, or use basis 'post_rope'",
            )


def _check_rank(index: int, stream: Stream, config: ModelConfig) -> None:
    width = len(stream.layers) * config.head_dim
    if stream.merge == "linear":
        if stream.rank > width:
            raise UserError(
                f"plan: streams[{index}].segments: lengths add up to {stream.rank}, expected at most layers * head_dim "
                f"{width}"
            )
    elif stream.rank != config.head_dim:
        raise UserError(
            f"plan: streams[{index}].segments: lengths add up to {stream.rank}, expected head_dim {config.head_dim}"
        )
