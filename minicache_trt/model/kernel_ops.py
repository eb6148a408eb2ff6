"""`TorchOps` for captured steps: nothing is created on the host, and norms run as one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from minicache_trt.config import ModelConfig, RopeConfig
from minicache_trt.model.torch_ops import Attention, TorchOps
from minicache_trt.parallel.collectives import Collectives


class KernelOps(TorchOps):
    """Parameters: as `TorchOps`; ``frequencies``: of every RoPE, float32 ``[rotary_dim / 2]`` where the weights are."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        attention: Attention,
        ranks: Collectives,
        frequencies: Mapping[RopeConfig, Tensor],
    ) -> None:
        super().__init__(config, weights, attention, ranks)
        self._device_frequencies = frequencies

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        if self._config.unit_offset_norm:
            weight = 1.0 + self._weights[f"{name}.weight"].float()
            return F.rms_norm(x.float(), x.shape[-1:], weight, self._config.rms_norm_eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._config.rms_norm_eps)

    def _frequencies(self, rope: RopeConfig, device: torch.device) -> Tensor:
        return self._device_frequencies[rope]
