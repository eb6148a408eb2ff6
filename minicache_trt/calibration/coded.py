"""Streams with their constants, compressed and restored together, and the history that reads them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicache_trt.compression.codec import compress_blocks, restore_blocks
from minicache_trt.compression.matrices import Matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import Stream
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.contract import StreamLayout, stream_layout
from minicache_trt.model.masked_attention import masked_attention, visible_keys


@dataclass(frozen=True)
class CodedStream:
    """One stream as the codec runs it."""

    layout: StreamLayout
    constants: StreamConstants

    @classmethod
    def of(cls, stream: Stream, matrices: Matrices, config: ModelConfig) -> CodedStream:
        """``matrices``: the stream's own, by their names."""
        prefixed = {f"streams.0.{name}": value for name, value in matrices.items()}
        return cls(stream_layout(0, stream, config), StreamConstants.of(prefixed, 0))

    def restored(self, x: Tensor, block_index: Tensor) -> Tensor:
        """``x [m, N, H, B, D]`` after compression: ``[m, N, H, B, D]`` float32."""
        fields = compress_blocks(self.layout, x, block_index, self.constants)
        members = range(len(self.layout.stream.layers))
        return torch.stack([restore_blocks(self.layout, fields, i, block_index, self.constants) for i in members])


def coded_streams(plan: CompressionPlan, config: ModelConfig) -> list[CodedStream]:
    """All streams of a plan."""
    return [
        CodedStream(stream_layout(index, stream, config), StreamConstants.of(plan, index))
        for index, stream in enumerate(plan.streams)
    ]


class History:
    """Keys and values of sequences that are decoded in parallel, of the layers from ``first`` on.

    The first ``compressed`` positions hold what was restored, the others what the layer computed.
    """

    def __init__(self, config: ModelConfig, streams: Sequence[CodedStream], first: int, shape: tuple[int, int]) -> None:
        sequences, length = shape
        size = (config.num_layers - first, sequences, config.num_kv_heads, length, config.head_dim)
        self._config, self._first = config, first
        self._streams = streams
        self._states = {"key": torch.zeros(size), "value": torch.zeros(size)}
        self._end = 0
        self._compressed = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep the keys and values of positions ``[end, end + T)`` and attend to all there are."""
        begin, end = self._end, self._end + key.shape[2]
        keys, values = (self._states[part][layer - self._first] for part in ("key", "value"))
        keys[:, :, begin:end], values[:, :, begin:end] = key, value
        visible = visible_keys(begin, end, self._config)[layer]
        cap = self._config.attention_softcap
        return masked_attention(query, keys[:, :, :end], values[:, :, :end], visible, cap)

    def advance(self, end: int) -> None:
        """All layers have computed the positions before ``end``."""
        self._end = end

    def compress(self, length: int) -> None:
        """Replace positions ``[compressed, length)``, whole blocks, by what the streams restore of them."""
        first, count = self._compressed // BLOCK_SIZE, (length - self._compressed) // BLOCK_SIZE
        if count <= 0:
            return
        for coded in self._streams:
            stream = coded.layout.stream
            states = self._states[stream.part]
            for block in range(first, first + count):
                tokens = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
                own = [layer - self._first for layer in stream.layers]
                x = states[own, :, :, tokens]
                states[own, :, :, tokens] = coded.restored(x, torch.full((x.shape[1],), block))
        self._compressed = length
