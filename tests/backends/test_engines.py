"""Engines against the independent reference, teacher-forced, on random checkpoints of many shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache_trt.build import build_engine, load_engine
from minicache_trt.compare import BlockRecorder, reference_for
from minicache_trt.compression.methods import METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import BuildConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.reference.ties import Ties
from minicache_trt.runtime.llm import LLM
from tests.support.checkpoints import SHAPES, make_checkpoint
from tests.support.plans import mixed_plan

LIMIT = 2e-3
"""Largest difference of logits."""

Lengths = list[int]


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def build(checkpoint: Path, output: Path, method: str, **limits: Any) -> Path:
    def configure(config: Any) -> tuple[CompressionPlan, BuildConfig]:
        plan = mixed_plan(config) if method == "mixed" else make_plan(config, method)
        return plan, BuildConfig(**({"max_seq_len": config.max_position_embeddings, "max_batch_size": 4} | limits))

    return build_engine(str(checkpoint), output, configure).directory


def assert_equals_reference(directory: Path, lengths: Lengths, decoded: int, backend: str = "onnxruntime") -> None:
    """Score random tokens in one ragged batch; every logit, greedy choice and stored code must be the reference's."""
    info = read_engine(directory)
    llm = LLM.from_engine(load_engine(directory, 1, backend))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, info.model.vocab_size, length + decoded).tolist() for length in lengths]
    recorder = BlockRecorder(llm.engine)
    scores = llm.score(sequences, lengths, observe=recorder)
    llm.check_integrity()
    reference = reference_for(directory, info)
    for index, (tokens, length, mine) in enumerate(zip(sequences, lengths, scores, strict=True)):
        ties = Ties()
        expected = reference.logits(tokens, length, adopt=recorder.adopter(index, ties)).numpy()
        assert np.abs(mine - expected).max() <= LIMIT
        assert ties.disagreements == 0, ties
        assert ties.differing_codes <= max(5, 1e-4 * ties.codes), ties
        best = np.sort(expected, -1)
        clear = best[:, -1] - best[:, -2] >= 2 * LIMIT
        assert (mine.argmax(-1) == expected.argmax(-1))[clear].all()
        if not info.plan.compresses:
            plain = reference.uncompressed_logits(tokens).numpy()
            assert np.abs(mine - plain).max() <= 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_long_ragged_batch(tmp_path: Path, method: str) -> None:
    """Prompts up to 2,500 tokens over a quantum boundary, chunked, with 200 tokens decoded and several demotions."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    directory = build(checkpoint, tmp_path / "engine", method, max_num_tokens=1000)
    assert_equals_reference(directory, [2500, 700, 64, 5], 200)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["full", "minicache4"])
def test_shapes(tmp_path: Path, shape: str, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70)


def test_every_option_of_a_stream(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", "mixed", quantum=128, window=100)
    assert_equals_reference(directory, [300, 70], 70)


@pytest.mark.parametrize("method", [*METHODS, "mixed"])
def test_torch_backend(tmp_path: Path, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70, backend="torch")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weight_only_formats_are_what_they_dequantize_to(tmp_path: Path, weights: str) -> None:
    """Exactly in the torch backend; up to its 8-bit activations in ONNX Runtime."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", hidden_size=80, initializer_range=0.06)
    directory = build(checkpoint, tmp_path / "engine", "kivi4", weights=weights, quantum=128)
    assert_equals_reference(directory, [200], 70, backend="torch")
    tokens = np.random.default_rng(1).integers(0, 101, 300).tolist()
    (mine,) = LLM.from_engine(load_engine(directory, 1)).score([tokens])
    info = read_engine(directory)
    quantized = reference_for(directory, info).logits(tokens, len(tokens)).numpy()
    original = reference_for(directory, info).uncompressed_logits(tokens).numpy()
    assert np.abs(mine - quantized).mean() < 0.1 * np.abs(original).mean()


def test_pools_hold_exactly_the_planned_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    for method in (*METHODS, "mixed"):
        for backend in ("onnxruntime", "torch"):
            directory = tmp_path / "engine" / method
            if not directory.exists():
                build(checkpoint, directory, method)
            engine = load_engine(directory, 1, backend)
            llm = LLM.from_engine(engine)
            sizes = llm.cache_sizes
            names = [f"kv.{layer}" for layer in range(engine.model.num_layers)]
            assert sum(engine.pool(name).nbytes for name in names) == sizes.full_bytes
            assert engine.allocate(7, 5) == 7 * sizes.full_block_bytes + 5 * sizes.compressed_block_bytes


def test_options_reach_the_plan(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")

    def configure(config: Any) -> tuple[CompressionPlan, BuildConfig]:
        options = MethodOptions(merge_start=1, t=0.3, gamma=0.1, norm="token", sink_tokens=4)
        return make_plan(config, "minicache", options), BuildConfig(max_seq_len=1024, quantum=128)

    directory = build_engine(str(checkpoint), tmp_path / "engine", configure).directory
    plan = read_engine(directory).plan
    merged = plan.streams[plan.find("key", 1)[0]]
    assert (merged.layers, merged.t, merged.retained, merged.norm, merged.sink_tokens) == ((1, 2), 0.3, 6, "token", 4)
    assert_equals_reference(directory, [260, 130], 70)
