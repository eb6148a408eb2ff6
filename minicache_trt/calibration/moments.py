"""Sums over calibration tokens that streams are computed from; their size does not depend on the text's length."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minicache_trt.compression.stream import PARTS
from minicache_trt.config import ModelConfig

Array = NDArray[np.float64]


@dataclass
class Moments:
    """Weighted sums over tokens, per part (keys before RoPE at 0, values at 1), layer and slot.

    A *slot* is a chain of matched KV heads through all layers: ``head_map[part, layer, slot]`` is the layer's head.

    Parameters
    ----------
    head_map : ndarray
        ``[2, L, H]`` int64.
    weight, gradient_weight : ndarray
        ``[]``: weights of the tokens added so far.
    mean : ndarray
        ``[2, L, H, D]``, sums of vectors.
    second : ndarray
        ``[2, G, L, H, D, D]``: sums of x_l^T x_(l + g) for layers up to G - 1 apart; zero beyond the last layer.
    gradient : ndarray
        Like ``second``, of the derivatives of the sampled log-likelihood with respect to restored keys and values.
    lowest, highest : ndarray
        ``[2, L, H, D]``, of keys after RoPE, and of values, by KV head.
    norm : ndarray
        ``[2, L, H]``, sums of norms, by KV head.
    """

    head_map: NDArray[np.int64]
    weight: Array
    gradient_weight: Array
    mean: Array
    second: Array
    gradient: Array
    lowest: Array
    highest: Array
    norm: Array

    @classmethod
    def zeros(cls, config: ModelConfig, head_map: NDArray[np.int64], reach: int) -> Moments:
        """Nothing added yet; ``reach`` is the largest group of layers."""
        base = (len(PARTS), config.num_layers, config.num_kv_heads)
        dim = config.head_dim
        products = (base[0], reach, *base[1:], dim, dim)
        vectors = (*base, dim)
        return cls(
            head_map, np.zeros(()), np.zeros(()), np.zeros(vectors), np.zeros(products), np.zeros(products),
            np.full(vectors, np.inf), np.full(vectors, -np.inf), np.zeros(base),
        )  # fmt: skip

    def add(self, part: int, layer: int, x: Tensor, weights: Tensor, recent: list[Tensor]) -> None:
        """Add one layer's vectors ``x [S, H, T, D]`` (by KV head, keys before RoPE), with weights ``[S]`` per token.

        ``recent`` holds the vectors of the layers before, in slots, latest last; this layer's are appended.
        """
        x = x[:, torch.from_numpy(self.head_map[part, layer])]
        self.mean[part, layer] += torch.einsum("s,shtd->hd", weights, x).double().numpy()
        norms = torch.einsum("s,sht->h", weights, x.norm(dim=-1)).double().numpy()
        self.norm[part, layer, self.head_map[part, layer]] += norms
        self._products(self.second, part, layer, x, weights, recent)

    def add_gradient(self, part: int, layer: int, g: Tensor, weights: Tensor, recent: list[Tensor]) -> None:
        """Add derivatives, with the arguments of `add`."""
        g = g[:, torch.from_numpy(self.head_map[part, layer])]
        self._products(self.gradient, part, layer, g, weights, recent)

    def add_range(self, part: int, layer: int, x: Tensor) -> None:
        """Widen the ranges to ``x [S, H, T, D]`` by KV head, keys after RoPE."""
        low, high = x.amin((0, 2)).double().numpy(), x.amax((0, 2)).double().numpy()
        np.minimum(self.lowest[part, layer], low, out=self.lowest[part, layer])
        np.maximum(self.highest[part, layer], high, out=self.highest[part, layer])

    def _products(self, target: Array, part: int, layer: int, x: Tensor, weights: Tensor, recent: list[Tensor]) -> None:
        recent.append(x)
        del recent[: -target.shape[1]]
        scaled = (x * weights[:, None, None, None]).transpose(0, 1).flatten(1, 2)
        for apart, earlier in enumerate(reversed(recent)):
            product = earlier.transpose(0, 1).flatten(1, 2).mT @ scaled
            target[part, apart, layer - apart] += product.double().numpy()

    def group(self, sums: Array, part: int, layers: tuple[int, ...]) -> Array:
        """Products of consecutive layers side by side, ``[H, m D, m D]``: sums, of ``second`` or ``gradient``."""
        rows = []
        for i in layers:
            row = [sums[part, j - i, i] if j >= i else np.swapaxes(sums[part, i - j, j], -1, -2) for j in layers]
            rows.append(np.concatenate(row, -1))
        result: Array = np.concatenate(rows, -2)
        return result

    def group_mean(self, part: int, layers: tuple[int, ...]) -> Array:
        """Means of consecutive layers side by side, ``[H, m D]``."""
        result: Array = np.concatenate([self.mean[part, layer] for layer in layers], -1) / self.weight
        return result

    def save(self, path: Path) -> None:
        """Write everything, exactly."""
        with path.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Inverse of `save`."""
        with np.load(path) as stored:
            return cls(**{field.name: stored[field.name] for field in fields(cls)})
