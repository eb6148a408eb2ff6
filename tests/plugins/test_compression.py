"""`CompressBlocks` as a plugin, in its host variant, against the independent reference codec."""

from __future__ import annotations

import pytest
import torch

from minicache_trt.compression.stream import PARTS
from minicache_trt.contract import plan_layout
from tests.gpu.cases import model
from tests.gpu.conftest import Kernels
from tests.support.agreement import assert_blocks_agree
from tests.support.plugin_cache import PluginCache
from tests.support.plugin_harness import Harness
from tests.support.plugin_nodes import nodes_named, plans_of

CONFIG = model(80, 3)
PLANS = {name: plan for name, plan in plans_of(CONFIG).items() if plan.compresses}
POISON = 77
SOURCE, TARGET, NUMBER = [3, 1, 5], [2, 4, 1], [0, 9, 60]


@pytest.mark.parametrize("name", PLANS)
def test_agrees_with_reference(harness: Harness, kernels: Kernels, name: str) -> None:
    """Codes differ only at ties; blocks that are no target keep their poison, full blocks keep everything."""
    plan, dtype = PLANS[name], torch.float16
    cache = PluginCache(harness, nodes_named(CONFIG, name), kernels.library, CONFIG, plan, kernels.device, dtype)
    cache.allocate(7, 6)
    torch.manual_seed(0)
    common = torch.randn(cache.tensors["kv.0"].shape)
    full = {}
    for pool_name, pool in cache.tensors.items():
        if pool_name.startswith("kv."):
            full[pool_name] = pool.copy_(common + 0.5 * torch.randn(common.shape)).clone()
        else:
            pool.fill_(POISON)
    cache.compress(*(torch.tensor(x, dtype=torch.int32) for x in (SOURCE, TARGET, NUMBER)))
    assert cache.calls == {"PagedAttention": 0, "CompressBlocks": len(plan.streams)}
    assert all(torch.equal(cache.tensors[pool_name], pool) for pool_name, pool in full.items())
    for layout in plan_layout(plan, CONFIG):
        place = PARTS.index(layout.stream.part)
        x = torch.stack([cache.tensors[f"kv.{layer}"][SOURCE, place] for layer in layout.stream.layers])
        pools = {kind: cache.tensors[pool.name] for kind, pool in layout.pools.items()}
        assert all((pool[[0, 3, 5]] == POISON).all() for pool in pools.values()), layout.stream
        fields = {kind: pool[TARGET] for kind, pool in pools.items()}
        assert_blocks_agree(plan, layout, fields, x, torch.tensor(NUMBER), dtype)


def test_no_blocks_is_no_change(harness: Harness, kernels: Kernels) -> None:
    plan, none = PLANS["minicache4"], torch.zeros(0, dtype=torch.int32)
    nodes = nodes_named(CONFIG, "minicache4")
    cache = PluginCache(harness, nodes, kernels.library, CONFIG, plan, kernels.device, torch.float32)
    cache.allocate(2, 2)
    for pool in cache.tensors.values():
        pool.fill_(1)
    cache.compress(none, none, none)
    assert all((pool == 1).all() for pool in cache.tensors.values())
