"""TensorRT-RTX engines on a GPU against the same graphs in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from minicache_trt.build import load_engine
from minicache_trt.runtime.llm import LLM
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import build

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("method", ["full", "kivi4", "minicache4"])
def test_logits_are_those_of_the_cpu(tmp_path: Path, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", head_dim=64)
    directory = build(checkpoint, tmp_path / "engine", method, backend="tensorrt-rtx", dtype="float16", quantum=128)
    tokens = [np.random.default_rng(i).integers(0, 101, n + 70).tolist() for i, n in enumerate((300, 70))]
    scores = {
        backend: LLM.from_engine(load_engine(directory, 1, backend)).score(tokens, [300, 70])
        for backend in ("tensorrt-rtx", "onnxruntime")
    }
    for mine, expected in zip(*scores.values(), strict=True):
        assert np.abs(mine - expected).mean() <= 0.02 * np.abs(expected).mean()
