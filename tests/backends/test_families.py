"""Engines of every family against Hugging Face's own model and its own ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from minicache_trt.build import load_engine
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.backends.test_engines import assert_equals_reference, build
from tests.support.checkpoints import SHAPES, make_checkpoint

FAMILY_SHAPES = [name for name in SHAPES if SHAPES[name].get("family", "llama") not in ("llama", "mistral")]


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def assert_equals_hugging_face(checkpoint: Path, directory: Path, length: int, backend: str = "onnxruntime") -> None:
    """Logits of random tokens within 1e-3, and greedy tokens equal."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, length).tolist()
    llm = LLM.from_engine(load_engine(directory, 1, backend))
    (mine,) = llm.score([tokens], [length - 70])
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    assert np.abs(mine - expected).max() <= 1e-3
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    (output,) = llm.generate([tokens], params)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([tokens])
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert output.outputs[0].token_ids == generated[0, length:].tolist()
    llm.check_integrity()


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("shape", FAMILY_SHAPES)
def test_logits_and_greedy_tokens(tmp_path: Path, shape: str, backend: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    directory = build(checkpoint, tmp_path / "engine", "full", backend=backend)
    assert_equals_hugging_face(checkpoint, directory, 300, backend)


@pytest.mark.parametrize("method", ["kivi4", "minicache4"])
@pytest.mark.parametrize("shape", FAMILY_SHAPES)
def test_compressed_without_compiled_kernels(
    tmp_path: Path, shape: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICACHE_CPU_KERNELS", "0")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70)


@pytest.mark.parametrize("shape", ["phi3", "qwen3, biases, tied"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weight_only_formats(tmp_path: Path, shape: str, weights: str) -> None:
    """Exactly in the torch backend: stacked tensors are quantized part by part."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape] | {"initializer_range": 0.06})
    directory = build(checkpoint, tmp_path / "engine", "kivi4", weights=weights, quantum=128)
    assert_equals_reference(directory, [200], 70, backend="torch")


@pytest.mark.parametrize(("max_seq_len", "length"), [(128, 100), (600, 300)])
def test_longrope_divisors_are_those_of_the_greatest_length(tmp_path: Path, max_seq_len: int, length: int) -> None:
    """Up to the trained length Hugging Face's short divisors; beyond it its long ones, as for a whole long prompt."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES["phi3, LongRoPE"])
    directory = build(checkpoint, tmp_path / "engine", "full", max_seq_len=max_seq_len)
    assert_equals_hugging_face(checkpoint, directory, length)


def test_longrope_before_rope_keys(tmp_path: Path) -> None:
    """The factor of cosines and sines stays in keys that are stored without their rotation."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **{**SHAPES["phi3, LongRoPE"], **WIDE})
    directory = build(checkpoint, tmp_path / "engine", "keys before RoPE", quantum=128)
    assert_equals_reference(directory, [300, 70], 70)


WIDE = {
    "hidden_size": 256,
    "rope_parameters": SHAPES["phi3, LongRoPE"]["rope_parameters"]
    | {"short_factor": [1.0] * 32, "long_factor": [1.0 + i / 4 for i in range(32)]},
}
