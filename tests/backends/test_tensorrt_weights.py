"""Weight-only engines of TensorRT: what RTX builds of them, and that their graphs compute what the codes say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache_trt.backends.tensorrt import estimate
from minicache_trt.backends.tensorrt.weight_only import row_codes, write_signed
from minicache_trt.build import load_engine
from minicache_trt.checkpoint.quantize import dequantize_weight
from minicache_trt.checkpoint.streaming import encode_header
from minicache_trt.engine_directory import DECODER, ENGINES, QUANTIZED, read_engine
from minicache_trt.errors import UserError
from minicache_trt.hf_reference import reference_for
from minicache_trt.runtime.llm import LLM
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import build

pytest.importorskip("tensorrt_rtx")

DEMO = Path(__file__).parents[2] / "examples" / "demo_model" / "checkpoint"
BUILD = "minicache_trt.backends.tensorrt.build"


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [("int4", "float16"), pytest.param("int8", "bfloat16", marks=LONG), pytest.param("fp8", "float16", marks=LONG)],
)
def test_engines_keep_codes(tmp_path: Path, weights: str, dtype: str) -> None:
    """The builder turns no code into a number: engine files are as large as codes, scales and the other weights."""
    limits: dict[str, Any] = {"backend": "tensorrt-rtx", "dtype": dtype, "max_seq_len": 1024, "max_num_tokens": 512}
    directory = build(DEMO, tmp_path / "engine", "full", weights=weights, **limits)
    info = read_engine(directory)
    needs = estimate.build_needs(info.model, info.build)
    assert needs is not None
    size = (directory / "decoder.engine").stat().st_size
    assert needs.weight_bytes <= size <= 1.1 * needs.weight_bytes + (16 << 20)
    plain = estimate.build_needs(info.model, dataclasses.replace(info.build, weights="fp32"))
    assert plain is not None and needs.weight_bytes < (0.5 if weights == "int4" else 0.7) * plain.weight_bytes
    assert not [path.name for path in directory.iterdir() if path.name.startswith(("cast.", "codes."))]
    layers = json.loads((directory / ENGINES).read_text())["engines"]["decoder.engine"]["layers"]
    assert layers["DEQUANTIZE"] == info.model.num_layers * 7 + 1


@pytest.fixture
def parsed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT imports the graphs and builds nothing; what it would build from stays in the directory."""
    monkeypatch.setattr(f"{BUILD}.build_engine_file", lambda network, path, *arguments: path.write_bytes(b""))
    monkeypatch.setattr(f"{BUILD}.TEMPORARY", ())


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("shape", [{}, {"attention_bias": True, "tie_word_embeddings": True}])
def test_graphs_compute_what_the_codes_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, shape: dict[str, Any]
) -> None:
    """TensorRT's graph and the directory's own, in ONNX Runtime, against PyTorch with the dequantized weights."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", initializer_range=0.05, **shape)
    limits = {"backend": "tensorrt-rtx", "dtype": "float32", "max_num_tokens": 64}
    directory = build(checkpoint, tmp_path / "engine", "full", weights=weights, **limits)
    tokens = np.random.default_rng(0).integers(0, 101, 100).tolist()
    expected = reference_for(directory, read_engine(directory)).uncompressed_logits(tokens).numpy()
    for graph in ("cast.onnx", DECODER):
        monkeypatch.setattr("minicache_trt.backends.onnxruntime.DECODER", graph)
        (mine,) = LLM.from_engine(load_engine(directory, 1, "onnxruntime")).score([tokens], [90])
        # MatMulNBits, which the directory's int4 graph has, rounds activations to 8 bits.
        limit = 2e-2 if (graph, weights) == (DECODER, "int4") else 1e-4
        assert np.abs(mine - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.usefixtures("parsed_only")
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_float16_graphs_run(tmp_path: Path, weights: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", initializer_range=0.05)
    limits = {"backend": "tensorrt-rtx", "dtype": "float16", "max_num_tokens": 64}
    directory = build(checkpoint, tmp_path / "engine", "kivi4", weights=weights, **limits)
    tokens = np.random.default_rng(0).integers(0, 101, 60).tolist()
    expected = reference_for(directory, read_engine(directory)).uncompressed_logits(tokens).numpy()
    (mine,) = LLM.from_engine(load_engine(directory, 1, "onnxruntime")).score([tokens], [50])
    assert np.abs(mine - expected).mean() <= 0.02 * np.abs(expected).mean()


@pytest.mark.parametrize("fmt, error_of", [("int8", 0.5001 / 127), ("fp8", 2.0**-4)])
def test_row_codes_are_the_nearest(fmt: str, error_of: float) -> None:
    """Rows of any size, a row of zeros among them; float8 has three bits of mantissa, below 2^-6 of its steps fewer."""
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32) * 10.0 ** np.arange(-3, 3)[:, None]
    weight = np.vstack([weight, np.zeros((1, 40))]).astype(np.float32)
    codes, scales = row_codes(weight, fmt)
    assert codes.shape == (7, 1, 40) and (scales > 0).all()
    error = np.abs(dequantize_weight(codes, scales, 8, 40) - weight)
    of = np.abs(weight).max(-1, keepdims=True) if fmt == "int8" else np.abs(weight) + 2.0**-6 * scales
    assert (error <= error_of * of).all() and not error[-1].any()


@pytest.mark.parametrize("case", ["zeros", "padded"])
def test_codes_tensorrt_cannot_take(tmp_path: Path, case: str) -> None:
    tensors = {"a.codes": np.zeros((4, 2, 16), np.uint8), "a.scales": np.ones((4, 2), np.float32)}
    tensors |= {"a.zeros": np.zeros((4, 1), np.uint8)} if case == "zeros" else {}
    kinds = {np.dtype(np.uint8): "U8", np.dtype(np.float32): "F32"}
    with (tmp_path / QUANTIZED).open("wb") as file:
        file.write(encode_header({name: (kinds[x.dtype], x.shape) for name, x in tensors.items()}, {"bits": "4"}))
        for array in tensors.values():
            file.write(array.tobytes())
    columns = 64 if case == "zeros" else 48
    cause = "a: its 4-bit weights have zero points" if case == "zeros" else "a: 48 inputs do not fill 2 blocks"
    with pytest.raises(UserError, match=cause):
        write_signed(tmp_path / "x", tmp_path / QUANTIZED, {"a": (4, columns)}, "float16", lambda done, total: None)
    assert not (tmp_path / "x").exists()
