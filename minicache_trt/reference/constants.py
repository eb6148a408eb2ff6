"""A stream's calibrated constants as the reference uses them, and the change of basis they define.

::

    x (post-rope, KV heads) --match--> slots --un-rotate--> --align--> the stream's basis
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import Stream
from minicache_trt.config import ModelConfig
from minicache_trt.reference.rotation import block_positions, rope_frequencies, rotate


@dataclass(frozen=True)
class Constants:
    """What a stream needs besides its vectors; matrices are float64, and None where the stream has no use for them.

    Parameters
    ----------
    head_map : Tensor or None
        int64 ``[m, H]``: KV head of each slot.
    align : Tensor or None
        ``[m, H, D, D]``.
    encode, decode, mean : Tensor or None
        ``[H, m * D, r]``, ``[H, r, m * D]`` and ``[H, m * D]``.
    sigma : Tensor or None
        ``[H, r]``.
    frequencies : Tensor or None
        float32 ``[D / 2]``: radians per position, for basis ``pre_rope``.
    """

    head_map: Tensor | None = None
    align: Tensor | None = None
    encode: Tensor | None = None
    decode: Tensor | None = None
    mean: Tensor | None = None
    sigma: Tensor | None = None
    frequencies: Tensor | None = None

    @classmethod
    def of(
        cls, stream: Stream, matrices: Mapping[str, NDArray[np.generic]], frequencies: Tensor | None = None
    ) -> Constants:
        """From a stream's matrices by their own names; ``frequencies`` are ignored unless the basis is ``pre_rope``.

        Raises
        ------
        ValueError
            A constant the stream needs is missing.
        """
        needed = [name for name, used in (("head_map", stream.match_heads), ("align", stream.align)) if used]
        if stream.merge == "linear":
            needed += ["encode", "decode", "mean", *(["sigma"] if stream.gaussian else [])]
        missing = [name for name in needed if name not in matrices]
        if stream.basis == "pre_rope" and frequencies is None:
            missing.append("frequencies")
        if missing:
            raise ValueError(f"constants: expected {', '.join(missing)} for this stream, got {sorted(matrices)}")
        tensors = {
            name: torch.from_numpy(matrices[name].astype(np.int64 if name == "head_map" else np.float64))
            for name in needed
        }
        return cls(**tensors, frequencies=frequencies if stream.basis == "pre_rope" else None)

    @classmethod
    def from_plan(cls, plan: CompressionPlan, index: int, config: ModelConfig) -> Constants:
        """Of stream ``index`` of a plan."""
        stream = plan.streams[index]
        rope = config.rope_at(stream.layers[0])
        frequencies = rope_frequencies(rope, config.head_dim) if stream.basis == "pre_rope" else None
        return cls.of(stream, stream_matrices(plan.matrices, index), frequencies)

    def to_slots(self, x: Tensor) -> Tensor:
        """Heads of ``[m, N, H, B, D]`` in slot order: slot h of layer i is KV head ``head_map[i, h]``."""
        if self.head_map is None:
            return x
        return torch.stack([layer[:, heads] for layer, heads in zip(x, self.head_map, strict=True)])

    def from_slots(self, x: Tensor) -> Tensor:
        """Undo `to_slots`."""
        if self.head_map is None:
            return x
        result = torch.empty_like(x)
        for i, heads in enumerate(self.head_map):
            result[i, :, heads] = x[i]
        return result

    def to_basis(self, x: Tensor, block_index: Tensor) -> Tensor:
        """Slots ``[m, N, H, B, D]`` in the stream's basis, float64: un-rotated, then aligned."""
        x = x.to(torch.float64)
        if self.frequencies is not None:
            x = rotate(x, block_positions(block_index), self.frequencies, backwards=True)
        if self.align is not None:
            x = torch.einsum("inhbd,ihde->inhbe", x, self.align)
        return x

    def from_basis(self, x: Tensor, block_index: Tensor) -> Tensor:
        """Undo `to_basis`; the inverse of ``align`` is its transpose."""
        if self.align is not None:
            x = torch.einsum("inhbe,ihde->inhbd", x, self.align)
        if self.frequencies is not None:
            x = rotate(x, block_positions(block_index), self.frequencies)
        return x
