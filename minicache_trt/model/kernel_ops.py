"""`TorchOps` for captured steps: nothing is created on the host, and norms run as one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from minicache_trt.config import ModelConfig
from minicache_trt.model.torch_ops import Attention, TorchOps
from minicache_trt.parallel.collectives import Collectives


class KernelOps(TorchOps):
    """Parameters: as `TorchOps`; ``frequencies``: float32 ``[rotary_dim / 2]`` on the device of the weights."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        attention: Attention,
        ranks: Collectives,
        frequencies: Tensor,
    ) -> None:
        super().__init__(config, weights, attention, ranks)
        self._frequencies = frequencies

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._config.rms_norm_eps)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angle, factor = positions.float()[:, None] * self._frequencies, self._config.rope.attention_factor
        return angle.cos() * factor, angle.sin() * factor
