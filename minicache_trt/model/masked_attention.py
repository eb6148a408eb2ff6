"""Causal attention over whole sequences with PyTorch, for what runs a checkpoint without a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from minicache_trt.config import ModelConfig


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, cap: float | None) -> Tensor:
    """Attention of scaled queries to keys that are ``visible [T, n]`` (bool): ``[S, num_heads, T, D]``.

    ``cap``: of the logits, `ModelConfig.attention_softcap`.
    """
    group = query.shape[1] // key.shape[1]
    if cap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=1.0, enable_gqa=group > 1
        )
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    logits = torch.tanh(query @ key.transpose(2, 3) / cap) * cap
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def visible_keys(begin: int, end: int, config: ModelConfig) -> list[Tensor]:
    """Which of keys ``[0, end)`` queries at positions ``[begin, end)`` see in each layer, ``[T, end]`` bool."""
    distance = torch.arange(begin, end)[:, None] - torch.arange(end)
    windows = [config.at_layer(layer).sliding_window for layer in range(config.num_layers)]
    causal = distance >= 0
    masks = {window: causal if window is None else causal & (distance < window) for window in set(windows)}
    return [masks[window] for window in windows]
