"""The whole engine on the device: against the reference backend, and captured steps against steps as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minicache_trt.backends.torch_kernels import CudaEngine, KernelEngine
from minicache_trt.backends.torch_reference import TorchEngine
from minicache_trt.build import build_engine
from minicache_trt.compression.methods import METHODS, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig, KvCacheConfig, ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.kernels.graphs import CudaRecorder, run_again
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.gpu.conftest import Kernels
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.plans import full_codec_plans, several_run_plans

RUNS = "int8x16 int4x32 | g4x16 g3x48 g2x32 g1x32 pre_rope"
PLANS = ["full", "kivi4", "minicache4", "pair KLT", "keys before RoPE", RUNS]


GEMMA = "gemma2, scale 20, caps 5 and 3, GQA 6:2, bfloat16"


def build(folder: Path, name: str, shape: str | None = None) -> Path:
    """With the plan ``name``; ``shape``: one of ``LAYERED``."""
    checkpoint = make_checkpoint(folder / "checkpoint", **(LAYERED[shape] if shape else {}) | {"head_dim": 64})

    def configure(config: ModelConfig) -> tuple[CompressionPlan, BuildConfig]:
        plan = make_plan(config, name) if name in METHODS else custom_plan(config, name)
        return plan, BuildConfig(max_batch_size=4, max_seq_len=1024, quantum=128, backend="torch")

    return build_engine(str(checkpoint), folder / "engine", configure).directory


def custom_plan(config: ModelConfig, name: str) -> CompressionPlan:
    return (full_codec_plans(config) | several_run_plans(config))[name]


def engine(kernels: Kernels, directory: Path, captured: bool) -> KernelEngine:
    record = CudaRecorder() if captured and kernels.on_gpu else run_again
    return KernelEngine(directory, read_engine(directory), kernels.library, kernels.device, torch.float16, record)


def random_sequences(lengths: list[int], decoded: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 101, length + decoded).tolist() for length in lengths]


@pytest.mark.parametrize(
    ("plan", "shape"), [*((plan, None) for plan in PLANS), ("full", GEMMA), ("minicache4", "gemma3")]
)
def test_logits_are_the_references(kernels: Kernels, tmp_path: Path, plan: str, shape: str | None) -> None:
    directory = build(tmp_path, plan, shape)
    lengths = [300, 70, 5]
    sequences = random_sequences(lengths, 150)
    llm = LLM.from_engine(engine(kernels, directory, captured=True))
    mine = llm.score(sequences, lengths)
    llm.check_integrity()
    expected = LLM.from_engine(TorchEngine(directory, read_engine(directory))).score(sequences, lengths)
    # Random Gemma 3 layers with 4-bit caches amplify rounding, that to float32 as much as that to float16.
    bound = 0.06 if shape == "gemma3" else 0.02
    for a, b in zip(mine, expected, strict=True):
        assert np.sqrt(np.square(a - b).mean()) <= bound * np.sqrt(np.square(b).mean())


@pytest.mark.parametrize("plan", PLANS)
def test_replayed_steps_are_the_steps(kernels: Kernels, tmp_path: Path, plan: str) -> None:
    """Contexts grow over bucket boundaries, sequences end: bit for bit what uncaptured steps compute."""
    directory = build(tmp_path, plan)
    prompts = random_sequences([1, 200, 66, 31, 140], 0)
    lengths = (300, 40, 200, 9, 100) if kernels.on_gpu else (70, 10, 60, 3, 20)  # nothing is captured without a GPU
    params = [SamplingParams(max_tokens=n, temperature=0.0, logprobs=1) for n in lengths]
    made = []
    for captured in (True, False):
        llm = LLM.from_engine(engine(kernels, directory, captured))
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        made.append([(output.token_ids, output.cumulative_logprob) for output in outputs])
        llm.check_integrity()
    assert made[0] == made[1]


@pytest.mark.usefixtures("named_library")
def test_memory_is_a_share_of_what_is_free(kernels: Kernels, tmp_path: Path) -> None:
    if not kernels.on_gpu:
        pytest.skip("needs an NVIDIA GPU")
    directory = build(tmp_path, "kivi4")
    opened = CudaEngine(directory, read_engine(directory))
    free = opened.free_memory()
    assert free is not None
    llm = LLM.from_engine(opened)
    assert llm.cache_sizes.num_bytes == opened.cache.num_bytes <= 0.9 * free
    with pytest.raises(UserError, match="free_gpu_memory_fraction"):
        LLM.from_engine(opened, kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=1e-9))
    with pytest.raises(UserError, match="too little memory for the cache"):
        opened.allocate(1 << 30, 4)
