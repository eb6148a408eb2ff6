"""Graphs as TensorRT gets them against those in the engine directory, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from minicache_trt.backends.tensorrt.simplified import simplify
from minicache_trt.backends.tensorrt.steps import count_shapes, split_step
from minicache_trt.contract import LOGITS
from minicache_trt.engine_directory import read_engine
from minicache_trt.kernels.steps import StepInputs, StepShape
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.engines import build
from tests.support.steps import step

TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(float16)": np.float16}


@pytest.fixture
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds end with their graphs."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr("minicache_trt.backends.tensorrt.build.build_engines", lambda *arguments: None)


def run(graph: Path, feeds: dict[str, Any], seed: int) -> dict[str, Any]:
    """All outputs; pools and whatever else is not given are random."""
    session, rng = ort.InferenceSession(graph), np.random.default_rng(seed)
    inputs = {}
    for value in session.get_inputs():
        if value.name in feeds:
            inputs[value.name] = feeds[value.name]
        elif value.type == "tensor(int32)":
            inputs[value.name] = rng.permutation(40)[:4].astype(np.int32)
        else:
            drawn = rng.integers(-100, 100, [48, *value.shape[1:]])
            inputs[value.name] = (drawn / (1 if value.type == "tensor(int8)" else 100)).astype(TYPES[value.type])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))


@pytest.mark.parametrize(
    ("method", "shape"), [("full", {}), ("minicache4", {}), ("mixed", {"head_dim": 64}), ("kivi4", LAYERED["gemma3"])]
)
def test_the_same_is_computed(tmp_path: Path, graphs_only: None, method: str, shape: dict[str, Any]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **shape)
    limits: dict[str, Any] = {"backend": "tensorrt-rtx", "dtype": "float32", "max_seq_len": 512}
    directory = build(checkpoint, tmp_path / "engine", method, **limits)
    compresses = read_engine(directory).plan.compresses
    for name in ("decoder.onnx", "compressor.onnx")[: 1 + compresses]:
        feeds: dict[str, Any] = {}
        if name == "decoder.onnx":
            (batch,) = split_step(step([(330, 256 * compresses, 1), (200, 64 * compresses, 1)]))
            loaded = StepInputs(StepShape.of(batch), torch.device("cpu"))
            loaded.load(batch)
            feeds = {key: value.numpy() for key, value in loaded.tensors.items()}
            feeds |= {key: np.zeros(n, np.int32) for key, n in count_shapes(loaded.shape, plugins=False).items()}
        simplify(directory / name, directory / "simple.onnx")
        expected, found = (run(directory / graph, feeds, 1) for graph in (name, "simple.onnx"))
        assert expected.keys() == found.keys() and (LOGITS in found) == bool(feeds)
        for output, values in expected.items():
            np.testing.assert_allclose(found[output], values, rtol=1e-5, atol=1e-5, err_msg=output)
        assert not feeds or np.isfinite(found[LOGITS]).all()
        before, after = (onnx.load(directory / graph, load_external_data=False) for graph in (name, "simple.onnx"))
        assert before.functions and not after.functions
