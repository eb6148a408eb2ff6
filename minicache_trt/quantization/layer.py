"""One decoder layer in float32 over token sequences, and what its linear layers take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minicache_trt.checkpoint.weights import WeightView
from minicache_trt.config import ModelConfig
from minicache_trt.model.decoder import decoder, gated_mlp
from minicache_trt.model.masked_attention import masked_attention, visible_keys
from minicache_trt.model.torch_ops import TorchOps
from minicache_trt.quantization.reading import read_weight

Observe = Callable[[str, Tensor], None]
"""Takes the name of a linear layer and its input ``[T, in]``."""


@dataclass
class InputStatistics:
    """What a linear layer's inputs are like.

    Parameters
    ----------
    magnitude : Tensor
        ``[in]``: mean absolute value.
    moments : Tensor
        ``[blocks, block, block]``: sums of products of inputs that share a scale; the last block is padded.
    tokens : int
    """

    magnitude: Tensor
    moments: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, inputs: int, block: int) -> InputStatistics:
        return cls(torch.zeros(inputs), torch.zeros(-(-inputs // block), block, block))

    def add(self, x: Tensor) -> None:
        """Count inputs ``[T, in]``."""
        total = self.tokens + len(x)
        self.magnitude += (x.abs().mean(0) - self.magnitude) * (len(x) / max(1, total))
        self.tokens = total
        block = self.moments.shape[-1]
        padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).view(len(x), -1, block).transpose(0, 1)
        self.moments += padded.transpose(1, 2) @ padded

    def divide(self, scales: Tensor) -> None:
        """The statistics of ``x / scales [in]``."""
        self.magnitude /= scales
        blocks, block, _ = self.moments.shape
        inverse = torch.nn.functional.pad(1 / scales, (0, blocks * block - len(scales))).view(blocks, block)
        self.moments *= inverse[:, :, None] * inverse[:, None]


class _Ops(TorchOps):
    """Operations of a model of one layer between hidden states: nothing is embedded, and there is no output layer."""

    def __init__(self, layer: Layer, weights: Mapping[str, Tensor], observe: Observe | None) -> None:
        super().__init__(layer.config, weights, layer.attend)
        self._observe = observe

    def embed(self, ids: Tensor) -> Tensor:
        return ids

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        return x if name == "norm" else super().rms_norm(x, name)

    def linear(self, x: Tensor, name: str) -> Tensor:
        if name == "lm_head":
            return x
        if self._observe is not None:
            self._observe(name, x)
        return super().linear(x, name)


class _AttentionOps(_Ops):
    """The same without an MLP; ``result`` is what attention adds to the residual stream."""

    result: Tensor

    def linear(self, x: Tensor, name: str) -> Tensor:
        if ".attention." not in name:
            return x
        self.result = super().linear(x, name)  # the last one is the output projection
        return self.result

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        x = super().rms_norm(x, name)
        if name.endswith(".attention.output_norm"):
            self.result = x
        return x

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate

    def moe(self, x: Tensor, name: str) -> Tensor:
        return x


class Layer:
    """A decoder layer over sequences ``[T, hidden]`` that each begin at position 0.

    It is a model of one layer: whatever its index, its weights are named ``layers.0``.

    Parameters
    ----------
    config : ModelConfig
    index : int
        Which layer.
    views : mapping
        All weights of the model; those of the layer are read.
    """

    def __init__(self, config: ModelConfig, index: int, views: Mapping[str, WeightView]) -> None:
        self.index = index
        self.config = replace(config.at_layer(index), num_layers=1, embedding_scale=1.0, logit_softcap=None)
        prefix = f"layers.{index}."
        self.views = {self.local(name): view for name, view in views.items() if name.startswith(prefix)}
        self.weights = {name: read_weight(view) for name, view in self.views.items()}

    def local(self, name: str) -> str:
        """A weight's name here."""
        return name.replace(f"layers.{self.index}.", "layers.0.", 1)

    def output(self, x: Tensor, observe: Observe | None = None) -> Tensor:
        """The residual stream after the layer; ``observe`` takes each linear layer's name and input."""
        return self._run(_Ops(self, self.weights, observe), x)

    def attention(self, x: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        """What attention adds to the residual stream ``[T, hidden]``, with some weights replaced."""
        ops = _AttentionOps(self, self.weights | dict(replaced), None)
        self._run(ops, x)
        return ops.result

    def mlp(self, h: Tensor, replaced: Mapping[str, Tensor]) -> Tensor:
        """What the MLP adds, of its normalized inputs ``[T, hidden]``, with some weights replaced."""
        ops = _Ops(self, self.weights | dict(replaced), None)
        y = ops.moe(h, "layers.0.moe") if self.config.num_experts else gated_mlp(ops, h, "layers.0.mlp")
        return ops.rms_norm(y, "layers.0.mlp.output_norm") if self.config.output_norms else y

    def _run(self, ops: _Ops, x: Tensor) -> Tensor:
        positions = torch.arange(len(x))
        return decoder(self.config, ops, x, positions, positions)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Causal attention of one sequence, ``[T, num_heads * head_dim]``; an `Attention`."""
        config, count = self.config, len(q)
        queries = q.view(count, config.num_heads, -1).transpose(0, 1)[None]
        keys, values = (x.view(count, config.num_kv_heads, -1).transpose(0, 1)[None] for x in (k, v))
        (visible,) = visible_keys(0, count, config)
        out = masked_attention(queries * config.attention_scale, keys, values, visible, config.attention_softcap)
        return out[0].transpose(0, 1).reshape(count, -1)
