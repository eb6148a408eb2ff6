"""`Ops` that compute with PyTorch, eagerly."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from minicache_trt.config import ModelConfig, RopeConfig
from minicache_trt.model.decoder import gated_mlp
from minicache_trt.model.rope import inverse_frequencies
from minicache_trt.parallel.collectives import ALONE, Collectives
from minicache_trt.parallel.shard import sums_over_ranks

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class TorchOps:
    """Parameters: the model's shape, its weights by canonical name, the attention over the cache, and other ranks.

    With several ranks, shape and weights are one rank's share (`minicache_trt.parallel.shard`).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        attention: Attention,
        ranks: Collectives = ALONE,
    ) -> None:
        self._config = config
        self._weights = weights
        self._attention = attention
        self._ranks = ranks

    def embed(self, ids: Tensor) -> Tensor:
        return self._weights["embed.weight"][ids]

    def linear(self, x: Tensor, name: str) -> Tensor:
        # A tied output layer has a weight of its own only where it is quantized and the embedding is not.
        tied = name == "lm_head" and f"{name}.weight" not in self._weights
        weight, bias = self._weights["embed.weight" if tied else f"{name}.weight"], self._weights.get(f"{name}.bias")
        if sums_over_ranks(name):
            y = self._ranks.sum(F.linear(x, weight))
            return y if bias is None else y + bias
        y = F.linear(x, weight, bias)
        return self._ranks.gather(y) if name == "lm_head" and len(weight) < self._config.vocab_size else y

    def scale(self, x: Tensor, factor: float) -> Tensor:
        # A number takes part in float32: rounded first, as a tensor of the type of x would be.
        return x * torch.tensor(factor, dtype=x.dtype).item()

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return torch.tanh(x / cap) * cap

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._config.rms_norm_eps)
        weight = self._weights[f"{name}.weight"]
        if self._config.unit_offset_norm:
            return (scaled * (1.0 + weight.float())).to(x.dtype)
        return weight * scaled.to(x.dtype)

    def head_norm(self, x: Tensor, name: str, heads: int) -> Tensor:
        return self.rms_norm(x.view(len(x), heads, -1), name).flatten(1)

    def rotation(self, positions: Tensor, rope: RopeConfig) -> tuple[Tensor, Tensor]:
        angle, factor = positions.float()[:, None] * self._frequencies(rope, positions.device), rope.attention_factor
        return angle.cos() * factor, angle.sin() * factor

    def _frequencies(self, rope: RopeConfig, device: torch.device) -> Tensor:
        return inverse_frequencies(rope, self._config.head_dim).to(device)

    def rotary(self, x: Tensor, rotation: tuple[Tensor, Tensor], heads: int) -> Tensor:
        cos, sin = (part[:, None].to(x.dtype) for part in rotation)
        x, half = x.view(len(x), heads, -1), self._config.rotary_dim // 2
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).flatten(1)

    def paged_attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        return self._attention(q, k, v, layer)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        active = F.silu(gate) if self._config.activation == "silu" else F.gelu(gate, approximate="tanh")
        return active * up

    def moe(self, x: Tensor, name: str) -> Tensor:
        shares = self.linear(x, f"{name}.router").float().softmax(-1)
        shares, chosen = shares.topk(self._config.experts_per_token, -1)
        shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, place = torch.where(chosen == expert)
            result = gated_mlp(self, x[rows], f"{name}.experts.{expert}")
            out.index_add_(0, rows, result * shares[rows, place][:, None])
        return self._ranks.sum(out)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows]
