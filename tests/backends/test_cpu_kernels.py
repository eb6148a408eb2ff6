"""The CPU kernels behind ONNX Runtime's custom operator: against the PyTorch twin, and where they are not used."""

from __future__ import annotations

import _ctypes
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from minicache_trt.backends import cpu_kernels
from minicache_trt.backends.onnxruntime import open_session
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.contract import DOMAIN
from minicache_trt.errors import UserError
from minicache_trt.model.attributes import attention_attributes
from minicache_trt.model.torch_attention import Pools, paged_attention
from minicache_trt.runtime.batch import Batch
from tests.support.attention import CONFIG, PLANS, STEPS, batch_of, node_inputs, random_projections, streams_of
from tests.support.plans import all_plans
from tests.support.steps import random_pools, step

INSTRUCTION_SETS = ("avx512", "avx2", "generic")
TYPES = {
    np.dtype(t): ir.DataType.from_numpy(np.dtype(t)) for t in (np.float32, np.float16, np.int8, np.int32, np.int64)
}

pytestmark = pytest.mark.skipif(cpu_kernels.cpu_kernels() is None, reason="CPU kernels not built: no C++ compiler")


def run_node(
    config: ModelConfig,
    plan: CompressionPlan,
    pools: Pools,
    batch: Batch,
    layer: int,
    threads: int = 1,
    **changed: object,
) -> tuple[np.ndarray, np.ndarray, tuple[torch.Tensor, ...]]:
    """One node with the custom operator: output, pool, and the projections it was given."""
    projections = random_projections(config, batch.num_tokens)
    arrays = node_inputs(plan, config, pools, batch, layer, projections)
    attrs = attention_attributes(config, streams_of(plan, config, pools, layer)) | changed
    inputs = [ir.val(f"in{i}", ir.DataType.from_numpy(x.dtype), shape=[*x.shape]) for i, x in enumerate(arrays)]
    node = ir.node("PagedAttention", inputs, attributes=attrs, domain=DOMAIN, num_outputs=2, overload="3")
    outputs = list(node.outputs)
    for name, value in zip(("out", "kv.out"), outputs, strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": 23, DOMAIN: 1}, name="node")
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    assert cpu_kernels.with_kernels(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(cpu_kernels.cpu_kernels()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    out, kv = session.run(None, {f"in{i}": x for i, x in enumerate(arrays)})
    return out, kv, projections


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", STEPS)
def test_kernels_agree_with_twin(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    plan = PLANS[name]
    batch, pools = batch_of(kind, plan), random_pools(CONFIG, plan)
    for layer, limit in zip((0, 3, 3), INSTRUCTION_SETS, strict=True):
        monkeypatch.setenv("MINICACHE_CPU_ISA", limit)
        out, kv, projections = run_node(CONFIG, plan, pools, batch, layer, threads=2)
        expected = paged_attention(pools, batch, *projections, layer)
        np.testing.assert_allclose(out, expected.numpy(), atol=2e-5)
        np.testing.assert_array_equal(kv, pools.tensors[f"kv.{layer}"].numpy())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(2, 2, 64), (8, 2, 64), (12, 1, 128), (3, 1, 96), (5, 1, 256), (4, 4, 112)]
)
def test_other_shapes(heads: int, kv_heads: int, dim: int) -> None:
    """Long histories too: several parts of a decode in each tier."""
    torch.manual_seed(2)
    config = ModelConfig("llama", 4, 64, 64, heads, kv_heads, dim, 100, 4096)
    plans = {"full": make_plan(config, "full")} | all_plans(config)
    for name in ("full", "kivi4", "minicache4", "mixed", *sorted(set(plans) - set(PLANS))):
        plan = plans[name]
        past, less = (9 * 64, 5 * 64) if plan.compresses else (0, 0)
        batch = step([(1300, past, 1), (9, 0, 1), (less + 130, less, 129)])
        pools = random_pools(config, plan)
        out, _, projections = run_node(config, plan, pools, batch, 2)
        np.testing.assert_allclose(out, paged_attention(pools, batch, *projections, 2).numpy(), atol=3e-5)


@pytest.mark.parametrize("window", [1, 64, 100, 191])
@pytest.mark.parametrize("name", ["full", "kivi4", "minicache4", "mixed", "keys before RoPE"])
def test_kernels_agree_with_twin_on_windows(name: str, window: int) -> None:
    """Tables name no block that is behind the window."""
    torch.manual_seed(8)
    config, plan = replace(CONFIG, sliding_window=window), PLANS[name]
    shapes = [(700, 512, 1), (230, 64, 1), (3, 0, 1), (400, 128, 257), (300, 192, 60), (20, 0, 20)]
    batch = step([(n, c if plan.compresses else 0, t) for n, c, t in shapes], sliding_window=window)
    pools = random_pools(config, plan)
    out, _, projections = run_node(config, plan, pools, batch, 2)
    np.testing.assert_allclose(out, paged_attention(pools, batch, *projections, 2).numpy(), atol=2e-5)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    """Bit for bit, decodes and prefill chunks, whatever runs beside them and on however many threads."""
    plan = PLANS["minicache4"]
    pools = random_pools(CONFIG, plan)
    alone, beside = step([(700, 128, 1), (190, 64, 40)]), step([(700, 128, 1), (70, 64, 1), (190, 64, 40)])
    rows = [0, *range(2, 42)]
    for name in ("full_table", "compressed_table"):
        table, wide = getattr(alone, name), getattr(beside, name)
        wide[0, : table.shape[1]], wide[2, : table.shape[1]] = table[0], table[1]
    beside.slot_mapping[rows] = alone.slot_mapping
    free = np.setdiff1d(np.arange(1, 48), alone.full_table)[0]
    beside.full_table[1, 0], beside.slot_mapping[1] = free, 64 * free + 5
    torch.manual_seed(5)
    expected, _, given = run_node(CONFIG, plan, pools, alone, 0)
    q, k, v = (torch.randn(42, x.shape[1]) for x in given)
    for wide_x, x in zip((q, k, v), given, strict=True):
        wide_x[rows] = x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.backends.test_cpu_kernels.random_projections", lambda *_: (q, k, v))
        out, _, _ = run_node(CONFIG, plan, pools, beside, 0, threads=2)
    np.testing.assert_array_equal(out[rows], expected)


def test_sliding_window() -> None:
    torch.manual_seed(6)
    window = 100
    for name in ("full", "minicache4"):
        plan = PLANS[name]
        past = 128 if plan.compresses else 0
        batch, pools = step([(700, past, 1), (300, past, 77)]), random_pools(CONFIG, plan)
        out, _, (q, k, v) = run_node(CONFIG, plan, pools, batch, 1, sliding_window=window)
        pools.append(1, k, v, torch.from_numpy(batch.slot_mapping).long())
        for s, count in enumerate((1, 77)):
            rows = slice(int(batch.query_start[s]), int(batch.query_start[s + 1]))
            length = int(batch.context_len[s])
            full = torch.from_numpy(batch.full_table[s, : -(-(length - past) // 64)]).long()
            blocks = torch.from_numpy(batch.compressed_table[s, : past // 64]).long()
            tiers = [pools.recent(place, 1, full)[:, : length - past] for place in (0, 1)]
            if past:
                tiers = [
                    torch.cat([pools.history(part, 1, blocks), tier], 1)
                    for part, tier in zip(("key", "value"), tiers, strict=True)
                ]
            keys, values = (tier.repeat_interleave(CONFIG.group_size, 0) for tier in tiers)
            position = torch.arange(length - count, length)[:, None]
            seen = (torch.arange(length) <= position) & (torch.arange(length) > position - window)
            queries = q[rows].view(count, CONFIG.num_heads, CONFIG.head_dim).transpose(0, 1)
            weights = (queries @ keys.mT / CONFIG.head_dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
            expected = (weights @ values).transpose(0, 1).flatten(1)
            np.testing.assert_allclose(out[rows], expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_never_reach_the_pools(bad: float) -> None:
    plan = PLANS["full"]
    batch, pools = step([(70, 0, 1), (90, 0, 26)]), random_pools(CONFIG, plan)
    q, k, v = random_projections(CONFIG, batch.num_tokens)
    k[0, 3], v[5, 7] = bad, bad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.backends.test_cpu_kernels.random_projections", lambda *_: (q, k, v))
        _, kv, _ = run_node(CONFIG, plan, pools, batch, 1)
    paged_attention(pools, batch, q, k, v, 1)
    np.testing.assert_array_equal(kv, pools.tensors["kv.1"].numpy())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head_dim": 72}, "head_dim: expected a multiple of 16"),
        ({"num_heads": 5}, "num_heads: expected a multiple of num_kv_heads"),
        ({"key_stream": "1 2 x"}, "key_stream: expected numbers, got x"),
        ({"value_stream": "9" + " 0" * 18}, "version 9"),
    ],
)
def test_bad_attributes_are_named(changed: dict[str, object], message: str) -> None:
    plan = PLANS["kivi4"]
    with pytest.raises(Exception, match=message):
        run_node(CONFIG, plan, random_pools(CONFIG, plan), step([(70, 64, 1)]), 0, **changed)


def test_graphs_that_do_not_describe_their_nodes_are_left_alone() -> None:
    node = onnx.helper.make_node("PagedAttention", ["q"], ["out"], domain=DOMAIN)
    function = onnx.helper.make_function(DOMAIN, "PagedAttention", ["q"], ["out"], [], [])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []), functions=[function])
    before = model.SerializeToString()
    assert not cpu_kernels.with_kernels(model)
    assert model.SerializeToString() == before


def test_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cpu_kernels.SWITCH, "0")
    assert cpu_kernels.cpu_kernels() is None and cpu_kernels.instruction_set() is None


def test_a_library_that_is_named_must_be_usable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Engines say so too, and do not silently run something slower."""
    missing, text = tmp_path / "missing.so", tmp_path / "text.so"
    text.write_text("not a library")
    cases = [(missing, f"there is no file {missing}"), (text, "cannot be loaded"), (tmp_path, "there is no file")]
    for name, cause in cases:
        monkeypatch.setenv(cpu_kernels.SWITCH, str(name))
        for ask in (cpu_kernels.cpu_kernels, cpu_kernels.instruction_set):
            with pytest.raises(UserError) as raised:
                ask()
            assert cause in raised.value.cause and "unset MINICACHE_CPU_KERNELS" in raised.value.remedy
    with pytest.raises(UserError, match="MINICACHE_CPU_KERNELS: there is no file"):
        open_session(tmp_path / "decoder.onnx", 1)


def test_a_library_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_kernels.SWITCH, _ctypes.__file__)
    with pytest.raises(UserError, match="does not hold minicache-trt's CPU kernels"):
        cpu_kernels.cpu_kernels()


def test_a_library_that_is_named_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "kernels.so"
    shutil.copyfile(cpu_kernels.cpu_kernels() or "", copy)
    before = cpu_kernels.instruction_set()
    monkeypatch.setenv(cpu_kernels.SWITCH, str(copy))
    assert cpu_kernels.cpu_kernels() == copy and cpu_kernels.instruction_set() == before
