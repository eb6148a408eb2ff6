"""Attention over both tiers, decodes and prefill chunks, against the PyTorch twin in float32."""

from __future__ import annotations

import pytest
import torch

from minicache_trt.compression.methods import make_plan
from minicache_trt.config import ModelConfig
from minicache_trt.runtime.batch import Batch
from tests.gpu.cases import Case, assert_agrees, model
from tests.gpu.conftest import Kernels
from tests.support.plans import all_plans, several_run_plans, single_run_plans
from tests.support.steps import step

TYPES = [torch.float16, torch.bfloat16]
MIXED = [(70, 0, 1), (130, 64, 1), (449, 384, 1), (65, 64, 1), (190, 64, 126), (300, 128, 150), (20, 0, 20)]


def mixed_step(compresses: bool) -> Batch:
    return step([(n, c if compresses else 0, tokens) for n, c, tokens in MIXED])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("plan", all_plans(model()))
def test_every_plan(kernels: Kernels, plan: str, dtype: torch.dtype) -> None:
    config = model()
    assert_agrees(kernels, Case.random(kernels, config, all_plans(config)[plan], step(MIXED), dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("method", ["full", "kivi4", "minicache4"])
def test_shapes(kernels: Kernels, method: str, dim: int, group: int, dtype: torch.dtype) -> None:
    config = model(dim, 2, group)
    assert_agrees(kernels, Case.random(kernels, config, make_plan(config, method), mixed_step(method != "full"), dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("plan", single_run_plans(model()))
def test_streams_of_one_run(kernels: Kernels, plan: str, dim: int, dtype: torch.dtype) -> None:
    config = model(dim)
    batch = step([(70, 64, 1), (700, 576, 1)])
    case = Case.random(kernels, config, single_run_plans(config)[plan], batch, dtype)
    for layer in (0, 3):
        assert_agrees(kernels, case, layer)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("plan", several_run_plans(model()))
def test_streams_of_several_runs(kernels: Kernels, plan: str, dim: int, dtype: torch.dtype) -> None:
    config = model(dim)
    batch = step([(70, 64, 1), (700, 576, 1), (330, 256, 1)])
    assert_agrees(kernels, Case.random(kernels, config, several_run_plans(config)[plan], batch, dtype), layer=3)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [80, 128])
@pytest.mark.parametrize("plan", ["pair KLT", "three layers, dropped segment, retention"])
def test_more_queries_than_a_block_maps(kernels: Kernels, plan: str, dim: int, dtype: torch.dtype) -> None:
    """Rows of a KV head over two thread blocks, the second one not full."""
    config = model(dim, 2, 8)
    batch = step([(70 + 3 * n, 64, 1) for n in range(7)])
    assert_agrees(kernels, Case.random(kernels, config, all_plans(config)[plan], batch, dtype))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 511, 512, 513, 1000])
def test_lengths_around_blocks_and_splits(kernels: Kernels, length: int) -> None:
    config = model(128, 2, 4)
    for method in ("full", "kivi4"):
        compressed = max(0, length - 64) // 64 * 64 if method != "full" else 0
        batch = step([(length, compressed, 1)])
        assert_agrees(kernels, Case.random(kernels, config, make_plan(config, method), batch, torch.float16))


@pytest.mark.parametrize("method", ["full", "kivi4"])
def test_long_contexts(kernels: Kernels, method: str) -> None:
    """Over many splits, some sequences far shorter than others."""
    lengths = [131_072, 30_000, 70] if kernels.on_gpu else [2_000, 70]
    config = ModelConfig("llama", 4, 64, 64, 4, 1, 128, 100, 1 << 17)
    full = method == "full"
    sequences = [(n, 0 if full else (n - 64) // 64 * 64, 1) for n in lengths]
    blocks = sum(-(-n // 64) for n in lengths) + 8
    batch = step(sequences, full_blocks=blocks, compressed_blocks=blocks)
    plan = make_plan(config, method)
    assert_agrees(kernels, Case.random(kernels, config, plan, batch, torch.float16, (blocks, blocks)))
