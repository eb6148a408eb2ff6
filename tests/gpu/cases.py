"""Caches on a device beside the same cache of the PyTorch twin, in float32 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.kernels.cache import KernelCache
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.model.torch_attention import Pools, paged_attention
from minicache_trt.runtime.batch import Batch
from tests.gpu.conftest import Kernels
from tests.support.steps import random_pools

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Unit roundoff of each compute type."""


def model(dim: int = 64, heads: int = 2, group: int = 2) -> ModelConfig:
    return ModelConfig("llama", 4, 64, 64, heads * group, heads, dim, 100, 1 << 17)


def rounded(pools: Pools, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pools of the twin in a compute type: what is float32 there is rounded, codes and float16 stay."""
    return {name: x.to(dtype) if x.dtype == torch.float32 else x for name, x in pools.tensors.items()}


@dataclass(frozen=True)
class Case:
    """One step over random pools: ``cache`` on the device, ``pools`` its twin with the same (rounded) numbers."""

    cache: KernelCache
    pools: Pools
    batch: Batch
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(
        cls,
        kernels: Kernels,
        config: ModelConfig,
        plan: CompressionPlan,
        batch: Batch,
        dtype: torch.dtype,
        blocks: tuple[int, int] = (48, 16),
    ) -> Case:
        generator = torch.Generator().manual_seed(1)
        pools = random_pools(config, plan, *blocks)
        tensors = rounded(pools, dtype)
        cache = KernelCache(kernels.library, config, plan, kernels.device, dtype)
        cache.tensors = {name: tensor.to(kernels.device, copy=True) for name, tensor in tensors.items()}
        model_pools = {name for name, tensor in pools.tensors.items() if tensor.dtype == torch.float32}
        same = {name: x.float() if name in model_pools else x for name, x in tensors.items()}
        twin = replace(pools, tensors=same)
        widths = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        q, k, v = (torch.randn(batch.num_tokens, n * config.head_dim, generator=generator).to(dtype) for n in widths)
        return cls(cache, twin, batch, q, k, v)

    def poison_unused(self) -> None:
        """Not a number in every slot of the full tier that no position of the step has."""
        batch = self.batch
        for name, kv in self.cache.tensors.items():
            if not name.startswith("kv."):
                continue
            used = torch.zeros(kv.shape[0], BLOCK_SIZE, dtype=torch.bool)
            for s, (n, c) in enumerate(zip(batch.context_len.tolist(), batch.compressed_len.tolist(), strict=True)):
                place = torch.arange(n - c)
                used[torch.from_numpy(batch.full_table[s]).long()[place // BLOCK_SIZE], place % BLOCK_SIZE] = True
            kv.masked_fill_(~used[:, None, None, :, None].to(kv.device), torch.nan)

    def attend(self, kernels: Kernels, layer: int) -> Tensor:
        step = StepInputs(StepShape.of(self.batch), kernels.device)
        step.load(self.batch)
        kernels.poison_free_memory()
        inputs = (x.to(kernels.device) for x in (self.q, self.k, self.v))
        return self.cache.attend(step, *inputs, layer).cpu()

    def expected(self, layer: int) -> Tensor:
        return paged_attention(self.pools, self.batch, self.q.float(), self.k.float(), self.v.float(), layer)


def assert_agrees(kernels: Kernels, case: Case, layer: int = 1) -> None:
    """Weights, results and operands of products are rounded to the compute type, everything else is float32."""
    expected = case.expected(layer)
    case.poison_unused()
    mine = case.attend(kernels, layer).float()
    assert torch.isfinite(mine).all()
    tolerance = 8 * ROUNDOFF[case.q.dtype] * (expected.abs() + expected.abs().amax(-1, keepdim=True)) + 1e-4
    apart = (mine - expected).abs() / tolerance
    assert (apart <= 1).all(), f"off by {float(apart.max()):.2f} of the tolerance"
