"""GPUs with less shared memory than a Hopper, as the emulated one can be: other stages, maps left in global memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minicache_trt.errors import UserError
from minicache_trt.kernels.emulated import EmulatedRuntime
from minicache_trt.kernels.library import KernelError
from tests.gpu.cases import Case, assert_agrees, model
from tests.gpu.conftest import Kernels
from tests.gpu.test_backend import build, engine
from tests.gpu.test_codec import check_codec
from tests.support.plans import all_plans, run_plans, wide_plans
from tests.support.steps import step

MIXED = [(70, 64, 1), (449, 384, 1), (65, 64, 1), (300, 128, 150)]


@pytest.fixture(autouse=True)
def ada(kernels: Kernels) -> Iterator[None]:
    if kernels.kind != "emulated":
        pytest.skip("a GPU is as large as it is; needs nvcc and no GPU, to emulate one")
    with EmulatedRuntime(kernels.library.path).device(processors=3, block_kib=99, processor_kib=100):
        yield


@pytest.mark.parametrize("plan", all_plans(model()))
def test_every_plan_of_large_heads(kernels: Kernels, plan: str) -> None:
    config = model(256)
    case = Case.random(kernels, config, all_plans(config)[plan], step(MIXED), torch.float16)
    for layer in (1, 3):
        assert_agrees(kernels, case, layer)


@pytest.mark.parametrize("plan", wide_plans(model()))
def test_wide_streams_of_large_heads(kernels: Kernels, plan: str) -> None:
    config = model(256)
    assert_agrees(kernels, Case.random(kernels, config, wide_plans(config)[plan], step(MIXED), torch.float16))


@pytest.mark.parametrize("plan", all_plans(model()))
def test_codec_of_large_heads(kernels: Kernels, plan: str) -> None:
    config = model(256)
    check_codec(kernels, config, all_plans(config)[plan])


def test_restoring_with_one_stage(kernels: Kernels) -> None:
    """Rows of 256 numbers in the compute type, of which not two blocks fit; left-out blocks among them."""
    config, runtime = model(256), EmulatedRuntime(kernels.library.path)
    cache = Case.random(kernels, config, all_plans(config)["minicache"], step(MIXED), torch.float16).cache
    blocks, numbers = torch.tensor([[3, -1, 5, 9, 3, 3, -1, 1], [0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int32)
    expected = cache.restore("key", 1, blocks, numbers)
    with runtime.device(block_kib=60, processor_kib=100):
        restored = cache.restore("key", 1, blocks, numbers)
    assert torch.equal(restored[blocks >= 0], expected[blocks >= 0])
    with (
        runtime.device(block_kib=32, processor_kib=100),
        pytest.raises(KernelError, match=r"restore_blocks: a block of these streams takes [0-9]+ bytes"),
    ):
        cache.restore("key", 1, blocks, numbers)


@pytest.mark.parametrize("plan", run_plans(model(128)))
def test_runs(kernels: Kernels, plan: str) -> None:
    config = model(128)
    assert_agrees(kernels, Case.random(kernels, config, run_plans(config)[plan], step(MIXED), torch.float16))


def test_a_refused_launch_leaves_no_error_behind(kernels: Kernels) -> None:
    runtime = EmulatedRuntime(kernels.library.path)
    case = Case.random(kernels, model(128), all_plans(model(128))["kivi4"], step(MIXED), torch.float16)
    refusal = r"decode_attention: .* takes [0-9]+ bytes of shared memory, the device has 61440"
    with runtime.device(block_kib=60, processor_kib=100), pytest.raises(KernelError, match=refusal):
        case.attend(kernels, 1)
    assert runtime.last_error() == 0
    assert_agrees(kernels, case)


def test_streams_too_large_are_refused_when_their_pools_are_made(kernels: Kernels, tmp_path: Path) -> None:
    directory = build(tmp_path, "keys before RoPE")
    own = engine(kernels, directory, captured=False)
    with (
        EmulatedRuntime(kernels.library.path).device(block_kib=48, processor_kib=100),
        pytest.raises(UserError, match=r"the kernels cannot run .* takes [0-9]+ bytes of shared memory.*onnxruntime"),
    ):
        own.allocate(4, 4)
    assert own.allocate(4, 4)  # on a larger one: the refusal has left nothing behind
