"""`PagedAttention` as a plugin, in its host variant, against the PyTorch twin."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from minicache_trt.config import ModelConfig
from minicache_trt.kernels.steps import StepInputs, StepShape
from minicache_trt.runtime.batch import Batch
from tests.gpu.cases import Case, assert_agrees, model
from tests.gpu.conftest import Kernels
from tests.support.plugin_cache import PluginCache
from tests.support.plugin_cases import STEPS, plugin_case
from tests.support.plugin_harness import Harness, PluginError, described
from tests.support.plugin_nodes import plans_of
from tests.support.steps import step

CONFIG = model()
REPRESENTATIVE = ("full", "kivi4", "minicache4", "minicache-token", "keys before RoPE", "aligned KLT", "mixed")


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_agrees_with_twin(harness: Harness, kernels: Kernels, name: str, kind: str) -> None:
    """Decodes, chunks and both; memory outside the contract, and the workspace, hold NaN."""
    for layer in (0, 3):
        assert_agrees(kernels, plugin_case(harness, kernels, CONFIG, name, STEPS[kind], torch.float32), layer)


@pytest.mark.long
@pytest.mark.parametrize("name", plans_of(CONFIG))
def test_every_plan(harness: Harness, kernels: Kernels, name: str) -> None:
    assert_agrees(kernels, plugin_case(harness, kernels, CONFIG, name, STEPS["mixed"], torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim", [80, 128])
def test_rounded_types(harness: Harness, kernels: Kernels, dim: int, dtype: torch.dtype) -> None:
    config = model(dim, 2, 4)
    for method in ("full", "kivi4"):
        assert_agrees(kernels, plugin_case(harness, kernels, config, method, STEPS["mixed"], dtype))


@pytest.mark.parametrize("name", ["full", "kivi4", "keys before RoPE"])
@pytest.mark.parametrize("window", [50, 191])
def test_sliding_window(harness: Harness, kernels: Kernels, name: str, window: int) -> None:
    config = replace(CONFIG, sliding_window=window)
    assert_agrees(kernels, plugin_case(harness, kernels, config, name, STEPS["mixed"], torch.float32))


@pytest.mark.parametrize("name", ["full", "kivi4", "keys before RoPE"])
def test_scale_and_soft_cap(harness: Harness, kernels: Kernels, name: str) -> None:
    config = replace(CONFIG, query_scalar=9.0, attention_softcap=2.0)
    assert_agrees(kernels, plugin_case(harness, kernels, config, name, STEPS["mixed"], torch.float32))


def test_appends_finite_numbers_alone(harness: Harness, kernels: Kernels) -> None:
    case = plugin_case(harness, kernels, CONFIG, "kivi4", STEPS["mixed"], torch.float32)
    case.k[0, 3], case.v[5, 7] = torch.nan, torch.inf
    case.attend(kernels, 1)
    case.expected(1)
    torch.testing.assert_close(case.cache.tensors["kv.1"], case.pools.tensors["kv.1"], rtol=0, atol=0)
    for name in ("kv.0", "stream.0.codes"):
        torch.testing.assert_close(case.cache.tensors[name], case.pools.tensors[name], rtol=0, atol=0)


def test_one_workspace_is_enough_for_all_smaller_steps(harness: Harness, kernels: Kernels) -> None:
    """One node, built once for its largest extents, runs steps of any smaller ones."""
    case = plugin_case(harness, kernels, CONFIG, "kivi4", STEPS["mixed"], torch.float32)
    for sequences in (STEPS["mixed"], STEPS["decodes"], STEPS["prefills"], [(1, 0, 1)], [(700, 640, 9)]):
        other = with_batch(case, step(sequences))
        assert_agrees(kernels, other, 2)
    assert isinstance(case.cache, PluginCache) and len(case.cache.built) == 1


def with_batch(case: Case, batch: Batch) -> Case:
    """Another step over the same pools; ids of blocks outside both steps stay poisoned."""
    generator = torch.Generator().manual_seed(3)
    config: ModelConfig = case.pools.config
    widths = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    q, k, v = (torch.randn(batch.num_tokens, n * config.head_dim, generator=generator) for n in widths)
    for name, pool in case.pools.tensors.items():
        case.cache.tensors[name].copy_(pool)
    return replace(case, batch=batch, q=q, k=k, v=v)


def test_enqueue_neither_allocates_nor_waits(harness: Harness, kernels: Kernels) -> None:
    blocking = ctypes.CDLL(str(harness.library)).minicache_blocking_calls
    case = plugin_case(harness, kernels, CONFIG, "keys before RoPE", STEPS["mixed"], torch.float32)
    before = blocking()
    case.attend(kernels, 0)
    prepared = blocking()
    assert prepared > before, "frequencies are uploaded when a context is made"
    case.attend(kernels, 0)
    assert blocking() == prepared


def test_pools_that_are_not_aliased_are_copied(harness: Harness, kernels: Kernels) -> None:
    """Where TensorRT gives the pool memory of its own: the same numbers there, the input as it was, one warning."""
    case = plugin_case(harness, kernels, CONFIG, "kivi4", STEPS["mixed"], torch.float32)
    cache = case.cache
    assert isinstance(cache, PluginCache)
    before = cache.tensors["kv.1"].clone()
    expected = case.attend(kernels, 1)
    updated = cache.tensors["kv.1"].clone()
    cache.tensors["kv.1"].copy_(before)
    step_inputs = StepInputs(StepShape.of(case.batch), kernels.device)
    step_inputs.load(case.batch)
    built = cache.built["layers.1.attention"]
    given = [described(x) for x in cache.inputs(built.node, cache.roles(step_inputs, case.q, case.k, case.v))]
    out, kv = torch.empty_like(case.q), torch.empty_like(before)
    workspace = torch.empty(built.workspace_bytes, dtype=torch.uint8)
    harness.messages()
    for _ in range(2):
        built.plugin.enqueue(given, [described(out), described(kv)], workspace.data_ptr())
    assert harness.messages().count("kv is copied in every step") == 1
    assert torch.equal(kv, updated) and torch.equal(out, expected)
    assert torch.equal(cache.tensors["kv.1"], before)


WRONG_EXTENTS = {
    "q": ((512, 64), "q: expected [T, 256], got [512, 64]"),
    "kv": ((48, 2, 4, 64, 64), "kv: expected [Nf, 2, 2, 64, 64], got [48, 2, 4, 64, 64]"),
    "full_table": ((9, 4), "full_table: expected [S, Mf], got [9, 4]"),
    "query_start": ((9,), "query_start: expected [8], got [9]"),
    "decode_rows": ((5,), "decode_rows and prefill_rows: expected 7 sequences in all, got 5 and 3"),
    "key.codes": ((16, 2, 64, 16), "key.codes: expected [Nc, 2, 64, 32], got [16, 2, 64, 16]"),
    "value.params": ((15, 2, 128), "value.params: expected [Nc, 2, 128], got [15, 2, 128]"),
}


def test_wrong_extents_are_refused(harness: Harness, kernels: Kernels) -> None:
    case = plugin_case(harness, kernels, CONFIG, "kivi4", STEPS["mixed"], torch.float32)
    case.attend(kernels, 1)
    cache = case.cache
    assert isinstance(cache, PluginCache)
    inputs = StepInputs(StepShape.of(case.batch), kernels.device)
    built = cache.built["layers.1.attention"]
    tensors = cache.inputs(built.node, cache.roles(inputs, case.q, case.k, case.v))
    given = {role: described(x) for role, x in zip(built.node.inputs, tensors, strict=True)}
    outputs = [given["q"], given["kv"]]
    built.plugin.shape_change(list(given.values()), outputs)
    for name, (extents, message) in WRONG_EXTENTS.items():
        other = given | {name: described(tensors[list(given).index(name)], extents)}
        with pytest.raises(PluginError) as error:
            built.plugin.shape_change(list(other.values()), outputs)
        assert f"PagedAttention: {message}" in str(error.value)
    with pytest.raises(PluginError, match="expected 19 inputs"):
        built.plugin.shape_change(list(given.values())[1:], outputs)
