"""The TensorRT backend's own work, steps, bindings, buckets and pools, on a stand-in that runs the engine's graphs."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache_trt.backends.tensorrt.engine import TensorRtEngine
from minicache_trt.backends.tensorrt.profiles import compressor_profiles, decoder_profiles, tensor_shapes
from minicache_trt.backends.tensorrt.steps import split_step
from minicache_trt.engine_directory import COMPRESSOR, COMPRESSOR_ENGINE, DECODER, DECODER_ENGINE, read_engine
from minicache_trt.errors import UserError
from minicache_trt.hf_reference import reference_for
from minicache_trt.kernels.graphs import run_again
from minicache_trt.runtime.llm import LLM
from minicache_trt.tracing import layers
from minicache_trt.tracing.decoder_graph import traced_decoder
from minicache_trt.tracing.engines import one_at_a_time
from minicache_trt.tracing.points import trace_points
from minicache_trt.tracing.recording import activations
from minicache_trt.tracing.tensorrt_engine import TracedTensorRtRtxEngine
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.engines import build
from tests.support.fake_tensorrt import FakeTensorRt
from tests.support.steps import step
from tests.tracing.record import record


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of these backends without their engine files, which take seconds to build."""
    monkeypatch.setattr("minicache_trt.backends.tensorrt.build.build_engines", lambda *arguments: None)


def open_fake(
    directory: Path, decoder_graph: str = DECODER, kind: type[TensorRtEngine] = TensorRtEngine
) -> tuple[TensorRtEngine, FakeTensorRt]:
    for graph, name in ((decoder_graph, DECODER_ENGINE), (COMPRESSOR, COMPRESSOR_ENGINE)):
        (directory / name).write_text(json.dumps({"graph": str(directory / graph)}))
    info = read_engine(directory)
    info = one_at_a_time(info) if issubclass(kind, TracedTensorRtRtxEngine) else info
    model, plan, limits = info.model, info.plan, info.build

    def profiles(name: str) -> Any:
        decoder = name != "compressor"
        own = decoder_profiles(limits, plan, model, False) if decoder else compressor_profiles(limits, plan, model)
        return own, tensor_shapes(plan, model, decoder)

    trt = FakeTensorRt(profiles)
    engine = kind.__new__(kind)
    engine._start(trt, directory, info, torch.device("cpu"), run_again)
    return engine, trt


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize(
    ("shape", "method"),
    [
        (None, "full"),
        (None, "kivi4"),
        (None, "minicache4"),
        ("gemma2, scale 20, caps 5 and 3, GQA 6:2, bfloat16", "full"),
        ("gemma3, windows in layers 1 and 2", "minicache4"),
    ],
)
def test_generates_what_the_reference_does(tmp_path: Path, shape: str | None, method: str) -> None:
    """Ragged prompts over a quantum, decoded together over several demotions, in float32."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **(LAYERED[shape] if shape else {"head_dim": 64}))
    limits = {"backend": "tensorrt-rtx", "dtype": "float32", "quantum": 128, "max_num_tokens": 150}
    directory = build(checkpoint, tmp_path / "engine", method, **limits)
    engine, trt = open_fake(directory)
    llm = LLM.from_engine(engine)
    rng = np.random.default_rng(0)
    lengths = [300, 70, 5]
    sequences = [rng.integers(0, 101, length + 70).tolist() for length in lengths]
    scores = llm.score(sequences, lengths, start=[n - 1 for n in lengths])
    llm.check_integrity()
    reference = reference_for(directory, engine_info := read_engine(directory))
    for tokens, length, mine in zip(sequences, lengths, scores, strict=True):
        expected = reference.logits(tokens, length).numpy()[length - 1 :]
        # Codes of ties may differ (see test_engines): few logits, and those by little.
        assert np.abs(mine - expected).mean() <= 1e-3
        assert np.abs(mine - expected).max() <= (0.3 if engine_info.plan.compresses else 2e-3)
    runs = trt.engines["decoder"].runs
    assert {shapes["prefill_rows"][0] for shapes in runs} == {1}
    decodes = [shapes for shapes in runs if shapes["prefill_rows"][1] == 1 and shapes["input_ids"][0] > 1]
    assert {shapes["input_ids"][0] for shapes in decodes} <= {2, 4}, "decodes are padded to buckets"
    assert engine.plan.compresses == ("compressor" in trt.engines)


@pytest.mark.usefixtures("graphs_only")
def test_all_wanted_rows_of_a_mixed_step_come_in_order(tmp_path: Path) -> None:
    """Two decodes and two chunks at once, one chunk without logits: as ONNX Runtime computes the step in one piece."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    directory = build(checkpoint, tmp_path / "engine", "full", backend="tensorrt-rtx", dtype="float32")
    engine, _ = open_fake(directory)
    from minicache_trt.build import load_engine

    whole = load_engine(directory, 1, "onnxruntime")
    batch = step([(70, 0, 1), (5, 0, 1), (90, 0, 20), (33, 0, 33)])
    ids = np.random.default_rng(1).integers(0, 101, batch.num_tokens).astype(np.int32)
    batch.input_ids[:] = ids
    object.__setattr__(batch, "logit_index", np.array([0, 1, 40, 54], np.int32))
    results = []
    for each in (engine, whole):
        each.allocate(48, 2)
        results.append(each.decode(batch).copy())
    np.testing.assert_allclose(results[0], results[1], atol=1e-4)
    for name in ("kv.0", "kv.3"):
        np.testing.assert_allclose(engine.pool(name)[1:], whole.pool(name)[1:], atol=1e-5)


@pytest.mark.usefixtures("graphs_only")
def test_pools_beyond_a_profile_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    directory = build(checkpoint, tmp_path / "engine", "full", backend="tensorrt-rtx", dtype="float16")
    engine, _ = open_fake(directory)
    with pytest.raises(UserError, match=r"kv\.0: expected a shape from \[2, 2, 2, 64, 32\] to"):
        engine.allocate(1 << 20, 1)


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("method", ["full", "kivi4"])
def test_traces_are_those_of_the_torch_backend(tmp_path: Path, method: str) -> None:
    """Every trace point of a debugging build, by position, over prefill chunks and decodes; then the comparison."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    limits = {"backend": "tensorrt-rtx", "dtype": "float32", "max_num_tokens": 48, "max_batch_size": 2}
    directory = build(checkpoint, tmp_path / "engine", method, **limits)
    info = one_at_a_time(read_engine(directory))
    (directory / "debug.onnx").write_bytes(traced_decoder(directory / DECODER, info.model))
    engine, trt = open_fake(directory, "debug.onnx", TracedTensorRtRtxEngine)
    assert isinstance(engine, TracedTensorRtRtxEngine)
    tokens = np.random.default_rng(0).integers(0, 101, 150).tolist()
    trace, logits = (recording := activations(engine)).record(LLM.from_engine(recording), tokens, 110)
    expected, expected_logits = record(directory, tokens, 110, "torch")
    assert list(trace) == list(expected) == list(trace_points(info.model))
    for point, array in expected.items():
        assert np.linalg.norm(trace[point] - array) <= 1e-4 * np.linalg.norm(array), point
    np.testing.assert_allclose(logits, expected_logits, atol=1e-3)
    runs = trt.engines["debug"].runs
    assert {1, 48} <= {shapes["input_ids"][0] for shapes in runs}


@pytest.mark.usefixtures("graphs_only")
def test_an_engine_without_trace_points_is_not_traced(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    directory = build(checkpoint, tmp_path / "engine", "full", backend="tensorrt-rtx", dtype="float32")
    with pytest.raises(UserError, match="its decoder does not output embed") as refused:
        open_fake(directory, kind=TracedTensorRtRtxEngine)
    assert refused.value.remedy == "build it with --enable-debug-output"


@pytest.mark.usefixtures("graphs_only")
def test_float16_graphs_are_traced_too(tmp_path: Path) -> None:
    """ONNX Runtime on a TensorRT engine's float16 graph, against PyTorch in float32."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    limits = {"backend": "tensorrt-rtx", "dtype": "float16", "max_num_tokens": 48, "max_batch_size": 2}
    directory = build(checkpoint, tmp_path / "engine", "kivi4", **limits)
    tokens = np.random.default_rng(0).integers(0, 101, 150).tolist()
    mine, expected = (record(directory, tokens, 110, backend)[0] for backend in ("onnxruntime", "torch"))
    for point, array in expected.items():
        error = np.linalg.norm(mine[point] - array) / np.linalg.norm(array)
        assert 0 < error <= layers.DTYPE_TOLERANCES["float16"], point


@pytest.mark.usefixtures("graphs_only")
def test_compiled_kernels_are_kept_between_runs(tmp_path: Path) -> None:
    """Kernels of earlier runs are not compiled again; a file that does not fit is replaced, and none is needed."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    directory = build(checkpoint, tmp_path / "engine", "full", backend="tensorrt-rtx", dtype="float32")
    kernels = directory / "decoder.cpu.kernels"

    def run() -> list[str]:
        engine, trt = open_fake(directory)
        engine.allocate(48, 1)
        engine.decode(step([(5, 0, 1), (33, 0, 1)]))
        engine.decode(step([(9, 0, 9)]))
        del engine
        gc.collect()
        return trt.engines["decoder"].compiled

    assert run() == ["(2,)", "(9,)"] and run() == []
    kernels.write_bytes(b"{")
    assert run() == ["(2,)", "(9,)"] and run() == []
    assert [path.name for path in directory.glob("*kernels*")] == [kernels.name]
    read_engine(directory)


def test_parts_of_a_step_are_the_step() -> None:
    batch = step([(700, 512, 1), (230, 64, 1), (400, 128, 257), (60, 0, 60)])
    object.__setattr__(batch, "logit_index", np.array([1, 2, 258, 318], np.int32))
    parts = split_step(batch)
    assert [len(part.context_len) for part in parts] == [2, 1, 1]
    for name in ("positions", "slot_mapping", "context_len", "compressed_len", "full_table", "compressed_table"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(joined, getattr(batch, name))
    begins = np.cumsum([0, *(part.num_tokens for part in parts)])
    rows = np.concatenate([part.logit_index + begin for part, begin in zip(parts, begins, strict=False)])
    np.testing.assert_array_equal(rows, batch.logit_index)
    assert all(part.query_start[0] == 0 and part.query_start[-1] == part.num_tokens for part in parts)


@pytest.mark.usefixtures("graphs_only")
@pytest.mark.parametrize("shape", ["llama", "mixtral"])
def test_half_precision_is_close_to_the_reference(tmp_path: Path, shape: str) -> None:
    """The directory's float16 graphs, weights cast from float32, on ONNX Runtime's own backend."""
    from minicache_trt.build import load_engine

    family = {"family": "mixtral", "num_local_experts": 4, "head_dim": 48} if shape == "mixtral" else {}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", initializer_range=0.05, **family)
    directory = build(checkpoint, tmp_path / "engine", "full", backend="tensorrt-rtx", dtype="float16")
    engine = load_engine(directory, 1, "onnxruntime")
    assert engine.element_bytes == 2
    tokens = np.random.default_rng(0).integers(0, 101, 150).tolist()
    llm = LLM.from_engine(engine)
    (mine,) = llm.score([tokens], [100])
    llm.check_integrity()
    expected = reference_for(directory, read_engine(directory)).uncompressed_logits(tokens).numpy()
    assert 0 < np.abs(mine - expected).mean() <= 0.01 * np.abs(expected).mean()
