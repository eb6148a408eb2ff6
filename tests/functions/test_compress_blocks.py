"""`CompressBlocks` as an ONNX function, in ONNX Runtime, against the independent reference codec."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from packaging.version import Version

from minicache_trt.compression.stream import PARTS
from minicache_trt.config import ModelConfig
from minicache_trt.contract import compressed_pools, full_pools, plan_layout
from minicache_trt.functions.compress_blocks import compress_blocks
from minicache_trt.functions.form import GraphForm
from minicache_trt.model import graph
from minicache_trt.model.maps import GraphMaps, plan_maps, writer_maps
from tests.support.agreement import assert_blocks_agree
from tests.support.onnx_function import run_function
from tests.support.plans import all_plans

CONFIG = ModelConfig("llama", 4, 64, 64, 6, 2, 80, 100, 4096)
PLANS = all_plans(CONFIG)
TYPES = {"model": np.float32, "int8": np.int8, "float16": np.float16}
SOURCE, TARGET, BLOCK_INDEX = (np.array(x, np.int32) for x in ([3, 1, 5], [2, 4, 1], [0, 9, 0]))


@pytest.mark.parametrize("name", PLANS)
def test_function_agrees_with_reference(name: str) -> None:
    torch.manual_seed(0)
    plan = PLANS[name]
    arrays = plan_maps(plan, CONFIG)
    for layout in plan_layout(plan, CONFIG):
        common = torch.randn(7, 2, 2, 64, 80)
        kv = [common + 0.5 * torch.randn_like(common) for _ in layout.stream.layers]
        kv[-1][1, :, 0, 7] = 0.0
        pools = [np.full((6, *pool.shape), 1, TYPES[pool.dtype]) for pool in layout.pools.values()]
        maps = writer_maps(layout, arrays)
        function = compress_blocks("CompressBlocks", layout, tuple(maps))
        inputs = [SOURCE, TARGET, BLOCK_INDEX, *[x.numpy() for x in kv], *[arrays[name] for name in maps.values()]]
        outputs = run_function(function, [*inputs, *pools])
        for output in outputs:
            assert (output[[0, 3, 5]] == 1).all(), "a block that is not a target was written"
        fields = {kind: torch.from_numpy(x[TARGET]) for kind, x in zip(layout.pools, outputs, strict=True)}
        x = torch.stack([layer[SOURCE, PARTS.index(layout.stream.part)] for layer in kv])
        assert_blocks_agree(plan, layout, fields, x, torch.from_numpy(BLOCK_INDEX))


@pytest.mark.skipif(
    Version(ort.__version__) < Version("1.31"), reason="TopK of no rows ends the process before ONNX Runtime 1.31"
)
def test_no_blocks_is_no_change() -> None:
    """The runtime never asks for it."""
    layout = plan_layout(PLANS["minicache4"], CONFIG)[-1]
    kv = [np.zeros((3, 2, 2, 64, 80), np.float32) for _ in layout.stream.layers]
    pools = [np.full((2, *pool.shape), 1, TYPES[pool.dtype]) for pool in layout.pools.values()]
    none = np.zeros(0, np.int32)
    outputs = run_function(compress_blocks("CompressBlocks", layout), [none, none, none, *kv, *pools])
    assert all((output == 1).all() for output in outputs)


@pytest.mark.parametrize("name", PLANS)
def test_streams_compressed_at_once_are_those_compressed_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compressor for TensorRT without plugins, which groups streams, against the CPU's; both in ONNX Runtime."""
    monkeypatch.setattr(graph, "STREAMS_AT_ONCE", 3)  # groups of several sizes
    plan, rng = PLANS[name], np.random.default_rng(0)
    arrays = plan_maps(plan, CONFIG)
    feeds = {"source_blocks": SOURCE, "target_blocks": TARGET, "block_index": BLOCK_INDEX}
    feeds |= {pool.name: rng.standard_normal((7, *pool.shape), np.float32) for pool in full_pools(CONFIG)}
    feeds |= {pool.name: np.ones((6, *pool.shape), TYPES[pool.dtype]) for pool in compressed_pools(plan, CONFIG)}
    results = []
    for form in (GraphForm(), GraphForm(loops=False, plugins=False)):
        model = ir.to_proto(graph.build_compressor(CONFIG, plan, GraphMaps(arrays, {}), form))
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        used = {value.name for value in session.get_inputs()}
        results.append((len(model.graph.node), session.run(None, {key: feeds[key] for key in used})))
    (each, expected), (grouped, found) = results
    assert grouped <= each
    for mine, own in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, own)
