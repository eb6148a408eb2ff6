"""Whole engines on the host build of the kernels against the reference backend, on random checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache_trt.backends.torch_kernels import HEAD_DIMS, HostKernelEngine, KernelEngine
from minicache_trt.backends.torch_reference import TorchEngine
from minicache_trt.compression.methods import METHODS
from minicache_trt.config import ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.kernels.graphs import run_again
from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.locate import LIBRARY_VARIABLE
from minicache_trt.reference.ties import TOLERANCE
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.support.checkpoints import LAYERED, SHAPES, make_checkpoint
from tests.support.engines import assert_equals_reference, build
from tests.support.plans import full_codec_plans


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def host_kernels(host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(host_library.path))


def scores(directory: Path, kind: type[Any], sequences: list[list[int]], lengths: list[int]) -> list[np.ndarray]:
    llm = LLM.from_engine(kind(directory, read_engine(directory), 1))
    result = llm.score(sequences, lengths)
    llm.check_integrity()
    return result


def random_sequences(lengths: list[int], decoded: int, vocabulary: int = 101) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocabulary, length + decoded).tolist() for length in lengths]


PLANS = [*METHODS, "mixed", "lossless", *full_codec_plans(ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096))]


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_equals_the_reference(tmp_path: Path, plan: str) -> None:
    """A ragged batch, prompts over several quanta, 70 tokens decoded and several demotions."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", plan, quantum=128)
    # The smallest steps of fp8 are 2e-6 of its range, not far from the rounding of what is stored.
    farthest = 2e-3 if plan == "fp8" else TOLERANCE
    assert_equals_reference(directory, [300, 70], 70, "host-kernels", farthest)


def with_heads(shape: dict[str, Any]) -> dict[str, Any]:
    """A shape with heads of a size the kernels are made for."""
    rope = shape.get("rope_parameters", {})
    if "short_factor" in rope:  # one number for each pair of a head of 32
        shape = shape | {"rope_parameters": rope | {name: rope[name] * 2 for name in ("short_factor", "long_factor")}}
    if shape.get("head_dim", 64) is None:
        return shape | {"hidden_size": 64 * shape.get("num_attention_heads", 4)}
    return shape | {"head_dim": shape["head_dim"] if shape.get("head_dim") in HEAD_DIMS else 64}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.long), "kivi4"])
def test_shapes(tmp_path: Path, shape: str, method: str) -> None:
    """Every family too: windows, experts, norms of heads, rotations of their own."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **with_heads(SHAPES[shape]))
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 3], 70, backend="host-kernels")


@pytest.mark.parametrize(
    ("shape", "method"), [("gemma2, head_dim 256, windows in layers 1 and 2", "kivi4"), ("gemma3", "minicache4")]
)
def test_layers_that_differ(tmp_path: Path, shape: str, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **with_heads(LAYERED[shape]))
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 3], 70, backend="host-kernels")


@pytest.mark.parametrize(
    ("dtype", "plan", "shape"),
    [
        (torch.float16, "full", {"head_dim": 64}),
        (torch.float16, "minicache4", {"head_dim": 64}),
        (torch.bfloat16, "full", {"head_dim": 64}),
        (torch.bfloat16, "minicache4", {"head_dim": 64}),
        (torch.float16, "full", LAYERED["gemma2"] | {"head_dim": 64}),
        (torch.bfloat16, "full", LAYERED["gemma3, windows in layers 1 and 2"]),
    ],
)
def test_half_precision(
    tmp_path: Path, host_library: KernelLibrary, dtype: torch.dtype, plan: str, shape: dict[str, Any]
) -> None:
    """As close as the type's rounding lets it be, measured by what is left of the logits' size."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **shape)
    directory = build(checkpoint, tmp_path / "engine", plan, quantum=128)
    info = read_engine(directory)
    engine = KernelEngine(directory, info, host_library, torch.device("cpu"), dtype, run_again)
    assert engine.element_bytes == 2
    sequences = random_sequences([200, 70], 20)
    llm = LLM.from_engine(engine)
    mine = llm.score(sequences, [200, 70])
    assert llm.cache_sizes.num_bytes == engine.cache.num_bytes
    for a, b in zip(mine, scores(directory, TorchEngine, sequences, [200, 70]), strict=True):
        allowed = 0.02 if dtype == torch.float16 else 0.12
        assert np.sqrt(np.square(a - b).mean()) <= allowed * np.sqrt(np.square(b).mean())


@pytest.mark.parametrize("plan", ["full", "kivi4", "minicache4", "pair KLT"])
def test_generation_equals_the_reference(tmp_path: Path, plan: str) -> None:
    """More requests than fit in a batch, of different lengths: buckets, padding and preemption change no token."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", plan, quantum=128, max_batch_size=3)
    prompts = random_sequences([1, 200, 66, 31, 140], 0)
    params = [SamplingParams(max_tokens=count, temperature=0.0) for count in (80, 10, 70, 3, 40)]
    made = {}
    for kind in (HostKernelEngine, TorchEngine):
        llm = LLM.from_engine(kind(directory, read_engine(directory), 1))
        made[kind] = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        llm.check_integrity()
    assert made[HostKernelEngine] == made[TorchEngine]


def test_pools_hold_exactly_the_planned_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", "minicache4")
    engine = HostKernelEngine(directory, read_engine(directory), 1)
    sizes = LLM.from_engine(engine).cache_sizes
    assert sum(engine.pool(f"kv.{layer}").nbytes for layer in range(4)) == sizes.full_bytes
    assert engine.allocate(7, 5) == 7 * sizes.full_block_bytes + 5 * sizes.compressed_block_bytes
    # The first launches have gone to block 0 alone.
    assert all(not engine.pool(name)[1:].any() for name in engine.cache.tensors)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_weight_only_formats_are_dequantized(tmp_path: Path, weights: str, tied: bool) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64, hidden_size=80, tie_word_embeddings=tied)
    directory = build(checkpoint, tmp_path / "engine", "full", weights=weights)
    assert_equals_reference(directory, [100], 5, backend="host-kernels")
    assert_equals_reference(directory, [100], 5, backend="torch")


def test_heads_no_kernel_takes_are_refused_when_loaded(tmp_path: Path) -> None:
    directory = build(make_checkpoint(tmp_path / "checkpoint", head_dim=32), tmp_path / "engine", "full")
    with pytest.raises(UserError, match="head_dim: expected 64, 80, 96, 128 or 256, got 32"):
        HostKernelEngine(directory, read_engine(directory), 1)
