"""What every implementation of `PagedAttention` is tested with: shapes, plans, ragged steps, one layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.functions.step import LayerStreams, step_inputs
from minicache_trt.model.graph import layer_streams
from minicache_trt.model.maps import plan_maps
from minicache_trt.model.torch_attention import Pools
from minicache_trt.runtime.batch import Batch
from tests.support.plans import all_plans
from tests.support.steps import step

CONFIG = ModelConfig("llama", 4, 64, 64, 6, 2, 80, 100, 4096)
PLANS: Mapping[str, CompressionPlan] = {"full": make_plan(CONFIG, "full")} | all_plans(CONFIG)
# (length after the step, compressed length, tokens): decodes first, then prefill chunks.
STEPS = {
    "mixed": [(70, 64, 1), (200, 128, 1), (190, 64, 126), (300, 64, 150), (20, 0, 20)],
    "decodes": [(65, 64, 1), (200, 128, 1), (3, 0, 1)],
    "prefills": [(190, 64, 126), (20, 0, 20)],
    "first token": [(1, 0, 1)],
    "tiles": [(500, 0, 300), (400, 128, 257)],
}


def batch_of(kind: str, plan: CompressionPlan) -> Batch:
    """The step ``kind``, without a compressed tier if the plan has none."""
    return step([(n, c if plan.compresses else 0, tokens) for n, c, tokens in STEPS[kind]])


def random_projections(config: ModelConfig, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one layer, packed."""
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (torch.randn(tokens, count * config.head_dim) for count in heads)
    return q, k, v


def streams_of(plan: CompressionPlan, config: ModelConfig, pools: Pools, layer: int) -> LayerStreams | None:
    """Where a layer's history is; None without a compressed tier."""
    return layer_streams(plan, pools.layouts, layer, plan_maps(plan, config)) if plan.compresses else None


def node_inputs(
    plan: CompressionPlan, config: ModelConfig, pools: Pools, batch: Batch, layer: int, projections: tuple[Tensor, ...]
) -> list[np.ndarray]:
    """Inputs of a layer's node in the order of the function's parameters; the full pool is a copy."""
    streams = streams_of(plan, config, pools, layer)
    arrays = [x.numpy() for x in (*projections, pools.tensors[f"kv.{layer}"].clone())]
    arrays += [getattr(batch, name) for name in step_inputs(plan.compresses)]
    if streams is not None:
        tensors = {name: tensor.numpy() for name, tensor in pools.tensors.items()} | plan_maps(plan, config)
        arrays += [tensors[tensor] for _, _, tensor in streams.inputs()]
    return arrays
