"""Where a decoder is observed: the names of a trace, the same for every backend.

::

    x = embed                                         embed
    for each layer l
        a = paged_attention(q, k, v)                  layers.<l>.attention    before the output projection
        x = x + o(a)                                  layers.<l>.middle       residual stream between the two halves
        x = x + mlp(x)                                layers.<l>.output       residual stream after the layer

Two traces that agree at one of these and part at the next differ in what lies between them: attention and its q, k, v
projections; the output projection; the MLP.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from minicache_trt.config import ModelConfig

Trace = dict[str, NDArray[np.float32]]
"""Point to ``[tokens, width]`` by position, in the order of computation."""

EMBED = "embed"
BETWEEN = {
    EMBED: "the embedding",
    "attention": "the q, k or v projection, RoPE, the cache or PagedAttention",
    "middle": "the output projection",
    "output": "the MLP",
    "logits": "the last norm or the output layer",
}
"""Last component of a point to what was computed since the point before it."""


def attention_point(layer: int) -> str:
    """Also the name of the layer's `PagedAttention` node."""
    return f"layers.{layer}.attention"


def middle_point(layer: int) -> str:
    return f"layers.{layer}.middle"


def output_point(layer: int) -> str:
    return f"layers.{layer}.output"


def trace_points(config: ModelConfig) -> dict[str, int]:
    """Every point and its width, in the order of computation."""
    points = {EMBED: config.hidden_size}
    for layer in range(config.num_layers):
        points[attention_point(layer)] = config.num_heads * config.head_dim
        points[middle_point(layer)] = config.hidden_size
        points[output_point(layer)] = config.hidden_size
    return points


def norm_inputs(config: ModelConfig) -> dict[str, str]:
    """Each norm that reads the residual stream of all tokens, to the point it reads.

    The decoder's last norm is not among them: it reads only the rows whose logits are wanted.
    """
    points = {"layers.0.input_norm": EMBED}
    for layer in range(config.num_layers):
        points[f"layers.{layer}.post_attention_norm"] = middle_point(layer)
        if layer + 1 < config.num_layers:
            points[f"layers.{layer + 1}.input_norm"] = output_point(layer)
    return points


def layer_of(point: str) -> int | None:
    """The layer a point belongs to; None for those before the first and after the last layer."""
    return int(point.split(".")[1]) if point.startswith("layers.") else None
