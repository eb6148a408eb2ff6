"""Rotary position embeddings, and how to undo them: component j is paired with component j + D / 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minicache_trt.config import BLOCK_SIZE, RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position, float32 ``[D / 2]``, from Hugging Face's own rotary module."""
    scaling: dict[str, Any] | None = None
    if rope.scaling != "none":
        scaling = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3" and scaling is not None:
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position
    options: dict[str, Any] = {
        "hidden_size": head_dim,
        "num_attention_heads": 1,
        "head_dim": head_dim,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        # Only compared with the original length, to warn about contexts that do not grow.
        "max_position_embeddings": int(rope.original_max_position * max(rope.factor, 1.0)),
    }
    config = LlamaConfig(**options)
    frequencies: Tensor = LlamaRotaryEmbedding(config).inv_freq
    return frequencies.to(torch.float32)


def block_positions(block_index: Tensor) -> Tensor:
    """Absolute positions ``[N, B]`` of the tokens of blocks ``[N]``."""
    return block_index.to(torch.int64)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor, backwards: bool = False) -> Tensor:
    """Rotate each pair (x_j, x_{j + D/2}) by position times frequency.

    Angles are products in float32, as in Hugging Face's models: at position 4096 they are off by up to 2e-4 radians,
    and whoever undoes the rotation must be off by the same. Cosines and sines are those of these angles in float64.

    Parameters
    ----------
    x : Tensor
        float64 ``[m, N, H, B, D]``.
    positions : Tensor
        integers ``[N, B]``.
    frequencies : Tensor
        float32 ``[D / 2]``.
    backwards : bool
        Undo the rotation.
    """
    angle = (positions[..., None].to(torch.float32) * frequencies.to(torch.float32)).to(torch.float64)
    if backwards:
        angle = -angle
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
