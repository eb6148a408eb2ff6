"""A sequence's keys and values in two tiers, and the attention function that reads them.

For a query at position p, with c its compressed length (`compressed_length`)::

    positions   [0, c)                          [c, p]
    attends to  blocks compressed once from     exact keys (after RoPE) and values
                their exact keys and values,
                then restored
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE
from minicache_trt.reference.codec import EncodedBlocks, encode, restore
from minicache_trt.reference.constants import Constants

ATTENTION_NAME = "minicache_reference"
"""Name of `tiered_attention` among transformers' attention implementations."""
QUERY_TILE = 256
"""Queries attended at a time, to bound the score matrix."""


def compressed_length(position: int, prompt_len: int, window: int, quantum: int) -> int:
    """Tokens that a query at ``position`` reads from the compressed tier, a multiple of the block size.

    Within the prompt it depends on the start of the position's quantum, after it on the position itself.
    """
    history = position // quantum * quantum if position < prompt_len else position
    return max(0, history - window) // BLOCK_SIZE * BLOCK_SIZE


Adopt = Callable[[int, int, Tensor, EncodedBlocks], EncodedBlocks]
"""From stream, number of the block, what is encoded ``[m, 1, H, B, D]`` and its encoding to the one to go on with."""


class TieredHistory:
    """Keys and values of one sequence, the first ``compressed`` tokens in restored form.

    Parameters
    ----------
    plan : CompressionPlan
    constants : sequence of Constants
        Of each stream.
    adopt : callable, optional
        May replace each block's encoding; see `minicache_trt.reference.ties`.

    Attributes
    ----------
    states : dict
        ``(part, layer)`` to ``[H, n, D]`` in the compute type.
    stored : list of list of EncodedBlocks
        Per stream and block, what compression stored (each with N = 1).
    """

    def __init__(self, plan: CompressionPlan, constants: Sequence[Constants], adopt: Adopt | None = None) -> None:
        self.plan = plan
        self._constants = tuple(constants)
        self._adopt = adopt
        self.compressed = 0
        self.states: dict[tuple[str, int], Tensor] = {}
        self.stored: list[list[EncodedBlocks]] = [[] for _ in plan.streams]

    def append(self, part: str, layer: int, new: Tensor) -> Tensor:
        """Add exact vectors ``[H, T, D]``; returns all of the layer's, ``[H, n, D]``."""
        old = self.states.get((part, layer))
        self.states[part, layer] = new if old is None else torch.cat([old, new], dim=1)
        return self.states[part, layer]

    def compress(self, length: int) -> None:
        """Move the compressed tier's end to ``length``, replacing the blocks before it, so far exact, in place."""
        for start in range(self.compressed, length, BLOCK_SIZE):
            tokens = slice(start, start + BLOCK_SIZE)
            for index, (stored, stream) in enumerate(zip(self.stored, self.plan.streams, strict=True)):
                states = [self.states[stream.part, layer] for layer in stream.layers]
                x = torch.stack([state[:, tokens] for state in states])[:, None]
                block_index = torch.tensor([start // BLOCK_SIZE])
                encoded = encode(x, block_index, stream, x.dtype, self._constants[index])
                if self._adopt is not None:
                    encoded = self._adopt(index, start // BLOCK_SIZE, x, encoded)
                for state, restored in zip(states, restore(encoded), strict=True):
                    state[:, tokens] = restored[0].to(state.dtype)
                stored.append(encoded)
        self.compressed = max(self.compressed, length)


def tiered_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    history: TieredHistory,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Append the new tokens to the history and attend to all of it, causally.

    ``query [1, Hq, T, D]``, ``key`` and ``value [1, H, T, D]`` are the new tokens, after RoPE; the result is
    ``[1, T, Hq, D]``. Signature and keyword arguments are those of transformers' attention functions; the mask is not
    used.
    """
    layer = module.layer_idx
    if not isinstance(layer, int):
        raise TypeError(f"layer_idx: expected an integer, got {layer!r}")
    keys = history.append("key", layer, key[0])
    values = history.append("value", layer, value[0])
    group = query.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    first = keys.shape[1] - query.shape[2]
    tiles = []
    for start in range(0, query.shape[2], QUERY_TILE):
        tile = query[0, :, start : start + QUERY_TILE]
        end = first + start + tile.shape[1]
        distance = torch.arange(first + start, end)[:, None] - torch.arange(end)
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        logits = (tile @ keys[:, :end].transpose(1, 2) * scaling).to(torch.promote_types(query.dtype, torch.float32))
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        weights = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
        tiles.append(weights.to(values.dtype) @ values[:, :end])
    return torch.cat(tiles, dim=1).transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(ATTENTION_NAME, tiered_attention)
