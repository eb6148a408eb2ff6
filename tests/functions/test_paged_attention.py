"""`PagedAttention`: the ONNX function against its PyTorch twin, and the twin against attention spelled out."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BLOCK_SIZE, ModelConfig
from minicache_trt.functions.paged_attention import paged_attention as build_function
from minicache_trt.model.torch_attention import paged_attention
from tests.support.attention import CONFIG, PLANS, STEPS, batch_of, node_inputs, random_projections, streams_of
from tests.support.onnx_function import run_function
from tests.support.steps import random_pools, step

MHA = ModelConfig("llama", 4, 64, 64, 2, 2, 64, 100, 4096)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", STEPS)
def test_function_agrees_with_twin(name: str, kind: str) -> None:
    torch.manual_seed(1)
    plan = PLANS[name]
    batch, pools = batch_of(kind, plan), random_pools(CONFIG, plan)
    for layer in (0, 3):
        projections = random_projections(CONFIG, batch.num_tokens)
        function = build_function("PagedAttention", CONFIG, streams_of(plan, CONFIG, pools, layer))
        out, kv = run_function(function, node_inputs(plan, CONFIG, pools, batch, layer, projections))
        expected = paged_attention(pools, batch, *projections, layer)
        np.testing.assert_allclose(out, expected.numpy(), atol=2e-5)
        np.testing.assert_array_equal(kv, pools.tensors[f"kv.{layer}"].numpy())


@pytest.mark.parametrize("name", ["full", "kivi4", "minicache4", "mixed", "keys before RoPE", "aligned KLT"])
@pytest.mark.parametrize("window", [1, 50, 100, 191])
def test_sliding_window(name: str, window: int) -> None:
    """The function against the twin; blocks behind the window are named nowhere. Decodes and chunks of both tiers."""
    torch.manual_seed(7)
    config, plan = replace(CONFIG, sliding_window=window), PLANS[name]
    shapes = [(700, 512, 1), (230, 64, 1), (3, 0, 1), (400, 128, 257), (300, 192, 60), (20, 0, 20)]
    batch = step([(n, c if plan.compresses else 0, t) for n, c, t in shapes], sliding_window=window)
    pools = random_pools(config, plan)
    for kv in pools.tensors.values():
        kv[0] = 0
    for layer in (0, 3):
        projections = random_projections(config, batch.num_tokens)
        function = build_function("PagedAttention", config, streams_of(plan, config, pools, layer))
        out, _ = run_function(function, node_inputs(plan, config, pools, batch, layer, projections))
        np.testing.assert_allclose(out, paged_attention(pools, batch, *projections, layer).numpy(), atol=2e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_twin_is_attention_over_the_named_slots(window: int | None) -> None:
    """Uncompressed, token by token, straight from the definition."""
    torch.manual_seed(2)
    config, plan = replace(MHA, sliding_window=window), make_plan(MHA, "full")
    batch, pools = step([(170, 0, 1), (90, 0, 30)], sliding_window=window), random_pools(config, plan)
    q, k, v = (torch.randn(batch.num_tokens, 128, dtype=torch.float32) for _ in range(3))
    out = paged_attention(pools, batch, q, k, v, 2)
    kv = pools.tensors["kv.2"].double()
    for t in range(batch.num_tokens):
        s = int(np.searchsorted(batch.query_start, t, side="right")) - 1
        for head in range(2):
            vectors = [
                kv[int(batch.full_table[s, p // BLOCK_SIZE]), :, head, p % BLOCK_SIZE]
                for p in range(int(batch.positions[t]) + 1)
                if window is None or p > int(batch.positions[t]) - window
            ]
            keys, values = (torch.stack([pair[place] for pair in vectors]) for place in range(2))
            weights = (keys @ q[t, 64 * head : 64 * head + 64].double() / math.sqrt(64)).softmax(0)
            torch.testing.assert_close(
                out[t, 64 * head : 64 * head + 64].double(), weights @ values, atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_never_reach_the_pools(bad: float) -> None:
    torch.manual_seed(3)
    plan = PLANS["minicache4"]
    batch, pools = step([(70, 64, 1), (90, 64, 26)]), random_pools(CONFIG, plan)
    q, k, v = random_projections(CONFIG, batch.num_tokens)
    k[0, 3], v[5, 7] = bad, bad
    function = build_function("PagedAttention", CONFIG, streams_of(plan, CONFIG, pools, 1))
    _, kv = run_function(function, node_inputs(plan, CONFIG, pools, batch, 1, (q, k, v)))
    paged_attention(pools, batch, q, k, v, 1)
    assert np.isfinite(kv).all() and pools.tensors["kv.1"].isfinite().all()
    np.testing.assert_array_equal(kv, pools.tensors["kv.1"].numpy())
