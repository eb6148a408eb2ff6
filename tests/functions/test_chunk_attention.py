"""`PagedAttention` without loops and branches against its PyTorch twin."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from minicache_trt.functions.form import GraphForm
from minicache_trt.functions.paged_attention import paged_attention as build_function
from minicache_trt.model.torch_attention import paged_attention
from tests.support.attention import CONFIG, PLANS, STEPS, batch_of, node_inputs, random_projections, streams_of
from tests.support.onnx_function import run_function
from tests.support.steps import random_pools


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", STEPS)
def test_function_without_loops_agrees_with_twin(name: str, kind: str) -> None:
    torch.manual_seed(1)
    plan = PLANS[name]
    batch, pools = batch_of(kind, plan), random_pools(CONFIG, plan)
    projections = random_projections(CONFIG, batch.num_tokens)
    form = GraphForm(ir.DataType.FLOAT, loops=False)
    function = build_function("PagedAttention", CONFIG, streams_of(plan, CONFIG, pools, 3), form)
    out, kv = run_function(function, node_inputs(plan, CONFIG, pools, batch, 3, projections))
    expected = paged_attention(pools, batch, *projections, 3)
    np.testing.assert_allclose(out, expected.numpy(), atol=2e-5)
    np.testing.assert_array_equal(kv, pools.tensors["kv.3"].numpy())
