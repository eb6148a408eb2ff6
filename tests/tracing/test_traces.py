"""Traces against Hugging Face's model, between backends, and against the engine that is not traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minicache_trt.build import load_engine
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.tracing.decoder_graph import traced_decoder
from minicache_trt.tracing.engines import open_traced
from minicache_trt.tracing.points import trace_points
from minicache_trt.tracing.recording import RecordingEngine, keys_and_values
from tests.cli.command import snapshot
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import mixed_plan
from tests.tracing.conftest import Build
from tests.tracing.record import record, tokens

BACKENDS = ("onnxruntime", "torch")
SEQUENCE, PROMPT = tokens(200), 110
"""Two prefill chunks and a bit; the last 72 tokens read compressed history."""


@torch.inference_mode()
def hugging_face(checkpoint: Path, token_ids: list[int]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Trace points by hooks, and keys and values ``[T, 2, H, D]`` of each layer from its cache."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    points: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            points[name] = inputs[0][0].numpy().copy()

        return hook

    layers = model.model.layers
    for index, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(keep(f"layers.{index - 1}.output" if index else "embed"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"layers.{index}.attention"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(f"layers.{index}.middle"))
    model.model.norm.register_forward_pre_hook(keep(f"layers.{len(layers) - 1}.output"))
    cache = model(torch.tensor([token_ids]), use_cache=True).past_key_values
    pairs = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return points, [torch.stack(pair).permute(2, 0, 1, 3).numpy() for pair in pairs]


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [{}, {"dtype": "bfloat16", "tie_word_embeddings": True}, {"attention_bias": True}])
def test_uncompressed_traces_are_hugging_faces(
    build: Build, tmp_path: Path, backend: str, shape: dict[str, object]
) -> None:
    source = make_checkpoint(tmp_path / "source", seed=3, **shape)
    directory = build("full", source)
    expected, _ = hugging_face(source, SEQUENCE)
    trace, _ = record(directory, SEQUENCE, PROMPT, backend)
    assert list(trace) == list(trace_points(read_engine(directory).model))
    assert set(trace) == set(expected)
    for name, array in expected.items():
        assert_close(trace[name], array)


@pytest.mark.parametrize("plan", ["kivi4", "minicache", mixed_plan])
def test_backends_agree(build: Build, plan: str | Callable[[ModelConfig], CompressionPlan]) -> None:
    directory = build(plan)
    (mine, logits), (theirs, other_logits) = (record(directory, SEQUENCE, PROMPT, backend) for backend in BACKENDS)
    assert list(mine) == list(theirs)
    for name, array in theirs.items():
        # A number on the boundary of two codes may be rounded either way: at most 1e-2 of an attention output.
        assert_close(mine[name], array, 1e-2)
        assert_close(mine[name][: PROMPT + 1], array[: PROMPT + 1])
    assert_close(logits, other_logits, 1e-2)


def test_weight_only_engine(build: Build) -> None:
    directory = build("kivi4", weights="int8")
    (mine, _), (theirs, _) = (record(directory, SEQUENCE, PROMPT, backend) for backend in BACKENDS)
    assert list(mine) == list(trace_points(read_engine(directory).model))
    for name, array in theirs.items():
        assert_close(mine[name], array, 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tracing_changes_nothing(build: Build, backend: str) -> None:
    directory = build("minicache")
    before = snapshot(directory)
    _, logits = record(directory, SEQUENCE, PROMPT, backend)
    llm = LLM.from_engine(load_engine(directory, 1, backend))
    (expected,) = llm.score([SEQUENCE], [PROMPT], start=PROMPT - 1)
    assert_close(logits, expected, 1e-6)
    assert snapshot(directory) == before


@pytest.mark.parametrize("plan", ["full", "minicache"])
def test_recorded_keys_and_values_are_hugging_faces(build: Build, checkpoint: Path, plan: str) -> None:
    """A prompt within one quantum attends to itself exactly, whatever the plan."""
    _, expected = hugging_face(checkpoint, SEQUENCE)
    trace, _ = record(build(plan), SEQUENCE, len(SEQUENCE), recorder=keys_and_values)
    assert list(trace) == [f"kv.{layer}" for layer in range(len(expected))]
    for layer, array in enumerate(expected):
        assert_close(trace[f"kv.{layer}"], array)


def test_one_sequence_at_a_time(build: Build) -> None:
    with pytest.raises(ValueError, match="max_batch_size: expected 1, got 2"):
        RecordingEngine(load_engine(build("full"), 1), lambda batch: {})


def test_graph_without_the_points(build: Build, tmp_path: Path) -> None:
    directory = build("full")
    model = read_engine(directory).model
    more = ModelConfig.from_dict(model.to_dict() | {"num_layers": model.num_layers + 1})
    with pytest.raises(UserError, match=r"no value for layers.3.output"):
        traced_decoder(directory / "decoder.onnx", more)
    (tmp_path / "decoder.onnx").write_bytes(b"\x08\x0a\xff")
    with pytest.raises(UserError, match="not an ONNX graph"):
        traced_decoder(tmp_path / "decoder.onnx", model)


def test_backend_that_cannot_be_traced(build: Build) -> None:
    directory = build("full")
    with pytest.raises(UserError, match="unknown backend 'pytorch'"):
        open_traced(directory, read_engine(directory), 1, "pytorch")
