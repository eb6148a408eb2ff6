"""The TensorRT plugins on the device, driven through TensorRT's interfaces: kernels, captured steps, whole engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minicache_trt.backends.torch_kernels import KernelEngine
from minicache_trt.backends.torch_reference import TorchEngine
from minicache_trt.engine_directory import read_engine
from minicache_trt.kernels.graphs import CudaRecorder, run_again
from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.gpu.cases import assert_agrees, model
from tests.gpu.conftest import Kernels
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import build
from tests.support.plugin_build import EMULATED_OUTPUT, HOST_OUTPUT, built_plugins, gpu_plugins
from tests.support.plugin_cases import STEPS, plugin_case
from tests.support.plugin_engine import use_plugins
from tests.support.plugin_harness import Harness
from tests.support.plugin_nodes import plans_of

ENGINES = ["full", "kivi4", "minicache4", "keys before RoPE"]


@pytest.fixture(scope="session")
def harness(kernels: Kernels) -> Harness:
    if kernels.on_gpu:
        folder = gpu_plugins(tensorrt=True)
    else:
        output = {"emulated": EMULATED_OUTPUT, "host": HOST_OUTPUT}[kernels.kind]
        folder = built_plugins(f"--{kernels.kind}", output=output)
    suffix = "" if kernels.on_gpu else f"_{kernels.kind}"
    return Harness(folder / "libminicache_trt_harness.so", folder / f"libminicache_trt_plugins{suffix}.so")


@pytest.fixture(scope="session")
def inside(harness: Harness, kernels: Kernels) -> Kernels:
    """The kernels inside the plugin library."""
    return replace(kernels, library=KernelLibrary(harness.library))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", plans_of(model()))
def test_attention(harness: Harness, inside: Kernels, plan: str, dtype: torch.dtype) -> None:
    for kind in STEPS:
        assert_agrees(inside, plugin_case(harness, inside, model(), plan, STEPS[kind], dtype), 3)


def scored(engine: KernelEngine | TorchEngine, sequences: list[list[int]], lengths: list[int]) -> list[np.ndarray]:
    llm = LLM.from_engine(engine)
    result = llm.score(sequences, lengths)
    llm.check_integrity()
    return result


def engine_directory(folder: Path, plan: str) -> Path:
    checkpoint = make_checkpoint(folder / "checkpoint", head_dim=64)
    return build(checkpoint, folder / "engine", plan, quantum=128, max_seq_len=512, max_num_tokens=512)


@pytest.mark.parametrize("plan", ENGINES)
def test_engines(harness: Harness, inside: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """Both ops, captured decode steps among them, as far from the reference backend as rounding explains."""
    directory = engine_directory(tmp_path, plan)
    info, lengths = read_engine(directory), [300, 70, 5]
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, info.model.vocab_size, length + 100).tolist() for length in lengths]
    expected = scored(TorchEngine(directory, info), sequences, lengths)
    caches = use_plugins(monkeypatch, harness, directory)
    record = CudaRecorder() if inside.on_gpu else run_again
    engine = KernelEngine(directory, info, inside.library, inside.device, torch.float16, record)
    for mine, theirs in zip(scored(engine, sequences, lengths), expected, strict=True):
        assert np.sqrt(np.square(mine - theirs).mean()) <= 0.02 * np.sqrt(np.square(theirs).mean())
    assert caches[0].calls["PagedAttention"] > 0 and (caches[0].calls["CompressBlocks"] > 0) == (plan != "full")


@pytest.mark.parametrize("plan", ENGINES)
def test_captured_steps_are_the_steps(
    harness: Harness, inside: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """Plugins enqueued into CUDA graphs and replayed: bit for bit what they compute one by one."""
    directory = engine_directory(tmp_path, plan)
    info = read_engine(directory)
    use_plugins(monkeypatch, harness, directory)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, info.model.vocab_size, length).tolist() for length in (1, 200, 66, 140)]
    params = [SamplingParams(max_tokens=n, temperature=0.0, logprobs=1) for n in (100, 40, 90, 9)]
    made = []
    for captured in (True, False):
        record = CudaRecorder() if captured and inside.on_gpu else run_again
        llm = LLM.from_engine(KernelEngine(directory, info, inside.library, inside.device, torch.float16, record))
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        made.append([(output.token_ids, output.cumulative_logprob) for output in outputs])
        llm.check_integrity()
    assert made[0] == made[1]


@pytest.mark.parametrize("method", ["full", "kivi4"])
def test_head_sizes(harness: Harness, inside: Kernels, method: str) -> None:
    for dim in (64, 80, 96, 128, 256):
        assert_agrees(inside, plugin_case(harness, inside, model(dim, 2, 4), method, STEPS["mixed"], torch.float16))
