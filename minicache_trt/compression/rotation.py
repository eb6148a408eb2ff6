"""Rotary embeddings of cached keys, undone and applied again by absolute position, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.model.rope import inverse_frequencies


def _angles(config: ModelConfig, block_index: Tensor) -> Tensor:
    """``[N, 1, B, D / 2]`` float32: position times frequency, as the decoder rotates."""
    offsets = torch.arange(BLOCK_SIZE, device=block_index.device)
    positions = (block_index.long()[:, None] * BLOCK_SIZE + offsets).float()
    return (positions[..., None] * inverse_frequencies(config.rope, config.head_dim).to(positions.device)).unsqueeze(1)


def rotate(config: ModelConfig, keys: Tensor, block_index: Tensor) -> Tensor:
    """Rotate ``[..., N, H, B, D]`` (component i paired with i + D / 2) by the positions of blocks ``[N]``."""
    angles = _angles(config, block_index)
    return _turn(keys, angles.cos(), angles.sin())


def unrotate(config: ModelConfig, keys: Tensor, block_index: Tensor) -> Tensor:
    """Inverse of `rotate`."""
    angles = _angles(config, block_index)
    return _turn(keys, angles.cos(), -angles.sin())


def _turn(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = keys.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
