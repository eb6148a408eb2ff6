"""Engines against the independent reference, teacher-forced, on random checkpoints of many shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache_trt.backends.cpu_kernels import SWITCH
from minicache_trt.build import build_engine, load_engine
from minicache_trt.compression.codec import compress_blocks
from minicache_trt.compression.methods import METHODS, MethodOptions, make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.stream import PARTS
from minicache_trt.compression.stream_constants import StreamConstants
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.contract import plan_layout
from minicache_trt.engine_directory import read_engine
from minicache_trt.hf_reference import reference_for
from minicache_trt.runtime.llm import LLM
from tests.support.checkpoints import SHAPES, make_checkpoint
from tests.support.engines import assert_equals_reference, build
from tests.support.plans import full_codec_plans


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", METHODS)
def test_long_ragged_batch(tmp_path: Path, method: str) -> None:
    """Prompts up to 2,500 tokens over a quantum boundary, chunked, with 200 tokens decoded and several demotions."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    directory = build(checkpoint, tmp_path / "engine", method, max_num_tokens=1000)
    assert_equals_reference(directory, [2500, 700, 64, 5], 200)


@pytest.mark.parametrize("method", ["full", "minicache4"])
def test_long_ragged_batch_without_compiled_kernels(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same by ONNX functions alone, as on a machine without a compiler."""
    monkeypatch.setenv(SWITCH, "0")
    test_long_ragged_batch(tmp_path, method)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["full", "minicache4"])
def test_shapes(tmp_path: Path, shape: str, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70)


@pytest.mark.parametrize("kernels", ["", "0"])
def test_every_option_of_a_stream(tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, kernels)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", "mixed", quantum=128, window=100)
    assert_equals_reference(directory, [300, 70], 70)


@pytest.mark.parametrize("method", [*METHODS, "mixed"])
def test_torch_backend(tmp_path: Path, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70, backend="torch")


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_lossless_streams_change_no_logit(tmp_path: Path, backend: str) -> None:
    """Un-rotated, matched, aligned, merged and back, over several demotions: the plan without streams says the same."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    tokens = [np.random.default_rng(i).integers(0, 101, n).tolist() for i, n in enumerate((450, 130))]
    logits = {}
    for method in ("full", "lossless"):
        directory = build(checkpoint, tmp_path / method, method, quantum=128, backend=backend)
        llm = LLM.from_engine(load_engine(directory, 1))
        logits[method] = llm.score(tokens, [200, 70])
        llm.check_integrity()
    assert llm.statistics.demotions > 0
    for mine, expected in zip(logits["lossless"], logits["full"], strict=True):
        assert np.abs(mine - expected).max() <= 1e-3


EVERY_PLAN = list(full_codec_plans(ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)))


@pytest.mark.parametrize("name", EVERY_PLAN)
def test_every_plan_of_the_full_codec(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", name, quantum=128)
    assert_equals_reference(directory, [300, 70], 70)


@pytest.mark.parametrize("name", EVERY_PLAN)
def test_torch_backend_runs_every_plan(tmp_path: Path, name: str) -> None:
    """What is stored is what the twin makes of the exact keys and values, and what is read is finite."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", name, quantum=128, backend="torch")
    engine = load_engine(directory, 1)
    plan = engine.plan
    engine.allocate(4, 4)
    rng = torch.Generator().manual_seed(0)
    for layer in range(4):
        kv = torch.from_numpy(engine.pool(f"kv.{layer}"))
        kv.copy_(torch.randn(kv.shape, generator=rng))
    source, target, block_index = (np.array(x, np.int32) for x in ([3, 1], [2, 3], [0, 5]))
    engine.compress(source, target, block_index)
    for layout in plan_layout(plan, engine.model):
        place = PARTS.index(layout.stream.part)
        x = torch.stack([torch.from_numpy(engine.pool(f"kv.{i}")[source, place]) for i in layout.stream.layers])
        constants = StreamConstants.of(full_codec_plans(engine.model)[name], layout.index)
        for kind, field in compress_blocks(layout, x, torch.from_numpy(block_index), constants).items():
            np.testing.assert_array_equal(engine.pool(layout.pools[kind].name)[target], field.numpy())
    llm = LLM.from_engine(engine)
    (logits,) = llm.score([np.random.default_rng(0).integers(0, 101, 300).tolist()], [200])
    assert np.isfinite(logits).all() and llm.statistics.demotions > 0


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
                build(checkpoint, directory, method, backend=backend)
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
