"""Engines over several processes against the independent reference, and what happens when a rank is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.backends.torch_reference import TorchEngine
from minicache_trt.build import load_engine
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.kernels.library import KernelLibrary
from minicache_trt.kernels.locate import LIBRARY_VARIABLE
from minicache_trt.parallel.engine import TensorParallelEngine
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.engines import assert_equals_reference, build

FOUR_HEADS = {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 104}
MORE_RANKS = {"num_attention_heads": 8, "num_key_value_heads": 2, "attention_bias": True, "vocab_size": 104}
ONE_KV_HEAD = MORE_RANKS | {"num_key_value_heads": 1}
MIXTRAL = FOUR_HEADS | {"family": "mixtral", "num_local_experts": 4}
PHI3 = {"family": "phi3", "head_dim": None, "num_key_value_heads": 4}
BIASES = {"attention_bias": True, "mlp_bias": True, "head_dim": 64}
TIED = {"tie_word_embeddings": True, "vocab_size": 101}


def make(folder: Path, size: int, plan: str, shape: dict[str, Any], backend: str = "torch", **limits: Any) -> Path:
    checkpoint = make_checkpoint(folder / "checkpoint", **shape)
    return build(checkpoint, folder / "engine", plan, quantum=128, backend=backend, tp_size=size, **limits)


def open_ranks(directory: Path) -> TensorParallelEngine:
    engine = load_engine(directory, 1)
    assert isinstance(engine, TensorParallelEngine)
    return engine


@pytest.mark.parametrize(
    ("size", "plan", "shape"),
    [
        (2, "keys before RoPE", BIASES),
        (4, "minicache4", FOUR_HEADS),
        (2, "full", MIXTRAL),
        (4, "kivi4", MORE_RANKS),
        pytest.param(4, "minicache4", MORE_RANKS, marks=pytest.mark.long),
        pytest.param(2, "kivi2", ONE_KV_HEAD, marks=pytest.mark.long),
        pytest.param(2, "minicache4", LAYERED["gemma3, capped, scaled rope, GQA 6:2, float16"], marks=pytest.mark.long),
        pytest.param(2, "full", TIED, marks=pytest.mark.long),
        pytest.param(4, "g3", FOUR_HEADS, marks=pytest.mark.long),
        pytest.param(4, "full", MIXTRAL, marks=pytest.mark.long),
        pytest.param(2, "kivi2", PHI3, marks=pytest.mark.long),
        pytest.param(2, "mean", TIED, marks=pytest.mark.long),
        pytest.param(4, "kivi4", FOUR_HEADS, marks=pytest.mark.long),
    ],
)
def test_equals_the_reference(tmp_path: Path, size: int, plan: str, shape: dict[str, Any]) -> None:
    """Every logit and every stored code, put together from the ranks' pools."""
    assert_equals_reference(make(tmp_path, size, plan, shape), [150, 70], 20, backend="torch")


def test_kernels_on_ranks(tmp_path: Path, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(host_library.path))
    directory = make(tmp_path, 2, "kivi4", {"head_dim": 64}, "host-kernels")
    assert_equals_reference(directory, [150, 70], 20, backend="host-kernels")


def test_weight_only_formats(tmp_path: Path) -> None:
    directory = make(tmp_path, 2, "full", {"tie_word_embeddings": True, "vocab_size": 104}, weights="int4")
    assert_equals_reference(directory, [100], 5, backend="torch")


def test_generation_and_bytes(tmp_path: Path) -> None:
    """The same tokens as one rank makes, in the same number of bytes; more requests than a batch holds."""
    directory = make(tmp_path, 2, "kivi4", {}, max_batch_size=2)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 101, length).tolist() for length in (150, 3, 70)]
    params = SamplingParams(max_tokens=20, temperature=0.0)
    made = []
    for engine in (open_ranks(directory), TorchEngine(directory, read_engine(directory), 1)):
        llm = LLM.from_engine(engine)
        tokens = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        llm.check_integrity()
        made.append((tokens, llm.cache_sizes.num_bytes))
    assert made[0] == made[1]


def test_copies_of_kv_heads_are_counted(tmp_path: Path) -> None:
    """Four ranks of a model with two KV heads hold each head twice."""
    directory = make(tmp_path, 4, "kivi4", MORE_RANKS)
    sizes = [
        LLM.from_engine(engine).cache_sizes
        for engine in (open_ranks(directory), TorchEngine(directory, read_engine(directory), 1))
    ]
    assert sizes[0].full_blocks == sizes[1].full_blocks and sizes[0].num_bytes == 2 * sizes[1].num_bytes


def test_a_lost_rank_ends_the_engine_with_a_line(tmp_path: Path) -> None:
    engine = open_ranks(make(tmp_path, 2, "full", {}))
    llm = LLM.from_engine(engine)
    victim = engine.processes[1]
    assert llm.failure is None
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    assert llm.failure == "the engine's ranks have ended (rank 1: its process ended)"  # before anybody has asked
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the engine's ranks have ended \(rank 1: its process ended\)"):
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
    assert all(process.poll() is not None for process in engine.processes)
    llm.check_integrity()


def test_ranks_end_with_the_engine(tmp_path: Path) -> None:
    engine = open_ranks(make(tmp_path, 2, "full", {}))
    processes = engine.processes
    engine.close()
    assert [process.poll() for process in processes] == [0, 0]
    assert engine.failure is None


def test_a_rank_that_cannot_load_its_share_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path, 2, "full", {"head_dim": 64}, "host-kernels")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        load_engine(directory, 1)
