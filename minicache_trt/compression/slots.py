"""What happens to a layer's heads before they are merged, and back: matching, un-rotation, alignment, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.compression.rotation import rotate, unrotate
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.contract import StreamLayout


def heads_to_slots(x: Tensor, constants: StreamConstants) -> Tensor:
    """``[m, N, H, B, D]`` with KV head ``head_map[i, h]`` of layer i in slot h."""
    if constants.head_map is None:
        return x
    return torch.stack([layer[:, heads] for layer, heads in zip(x, constants.head_map, strict=True)])


def slots_to_heads(x: Tensor, member: int, constants: StreamConstants) -> Tensor:
    """``[N, H, B, D]`` of layer ``member`` with every slot's vectors at their own KV head."""
    return x if constants.head_map is None else x[:, constants.head_map[member].argsort()]


def into_basis(layout: StreamLayout, x: Tensor, block_index: Tensor, constants: StreamConstants) -> Tensor:
    """Un-rotate (``pre_rope``) and align ``[m, N, H, B, D]`` float32, heads in slots."""
    if layout.stream.basis == "pre_rope":
        x = unrotate(layout.config, x, block_index)
    return x if constants.align is None else x @ constants.align[:, None]


def out_of_basis(
    layout: StreamLayout, x: Tensor, member: int, block_index: Tensor, constants: StreamConstants
) -> Tensor:
    """Inverse of `into_basis` for ``[N, H, B, D]`` of layer ``member``."""
    if constants.align is not None:
        x = x @ constants.align[member].mT
    return rotate(layout.config, x, block_index) if layout.stream.basis == "pre_rope" else x
