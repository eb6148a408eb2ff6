"""Models whose layers differ, in their windows or their RoPE, against Hugging Face; Gemma's norms, scales and caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Gemma3ForConditionalGeneration

from minicache_trt.build import build_engine, load_engine
from minicache_trt.compression.methods import make_plan
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.compression.segment import Segment
from minicache_trt.compression.stream import Stream
from minicache_trt.config import BuildConfig, ModelConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.backends.test_families import assert_equals_hugging_face
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.engines import assert_equals_reference, build
from tests.support.plans import completed

CAPPED = "gemma2, scale 20, caps 5 and 3, GQA 6:2, bfloat16"
PAIR = "gemma3, windows in layers 1 and 2"


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", LAYERED)
def test_logits_and_greedy_tokens(tmp_path: Path, shape: str) -> None:
    """Of a prompt longer than every window."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED[shape])
    directory = build(checkpoint, tmp_path / "engine", "full")
    assert_equals_hugging_face(checkpoint, directory, 300)


@pytest.mark.parametrize(("shape", "method"), [(CAPPED, "minicache4"), ("gemma3", "full")])
def test_torch_backend(tmp_path: Path, shape: str, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED[shape])
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [230, 70], 40, backend="torch")


@pytest.mark.parametrize(
    ("shape", "method", "kernels"),
    [
        (CAPPED, "kivi4", ""),
        pytest.param(CAPPED, "minicache4", "", marks=pytest.mark.long),
        (CAPPED, "minicache4", "0"),
        pytest.param("gemma3", "minicache4", "", marks=pytest.mark.long),
        (PAIR, "before RoPE", ""),
        pytest.param(PAIR, "before RoPE", "0", marks=pytest.mark.long),
        ("gemma3, all layers with a window", "kivi4", ""),
        ("qwen2, window from layer 2", "minicache", "0"),
    ],
)
def test_compressed(tmp_path: Path, shape: str, method: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged layers may have different windows; streams of keys before RoPE have layers that rotate alike."""
    monkeypatch.setenv("MINICACHE_CPU_KERNELS", kernels)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED[shape])
    if method == "before RoPE":
        limits = BuildConfig(max_seq_len=512, max_batch_size=4, quantum=128)
        directory = build_engine(str(checkpoint), tmp_path / "engine", lambda c: (before_rope(c), limits)).directory
    else:
        directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70)


def before_rope(config: ModelConfig) -> CompressionPlan:
    """Keys of ``PAIR`` before RoPE, the layers with a window and those without apart."""
    short = (Segment(16, "g4"), Segment(16, "g2", transform="hadamard"))
    return completed(
        config,
        Stream("key", (0, 3), short, merge="linear", basis="pre_rope", retained=2, sink_tokens=2),
        Stream("key", (1, 2), (Segment(64, "int8"),), merge="mean", basis="pre_rope", retained=2),
    )


def test_text_part_of_a_model_that_takes_images(tmp_path: Path) -> None:
    """Its language model's weights, below a prefix; the others are left out."""
    text = {key: value for key, value in LAYERED["gemma3"].items() if key != "family"}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {**shape, "vocab_size": 101, "head_dim": 32, "initializer_range": 0.12, "model_type": "gemma3_text"}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model: Any = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    directory = build(tmp_path / "checkpoint", tmp_path / "engine", "full", max_seq_len=400)
    tokens = np.random.default_rng(3).integers(0, 101, 250).tolist()
    (mine,) = LLM.from_engine(load_engine(directory, 1)).score([tokens])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    assert np.abs(mine - expected).max() <= 1e-3
    directory = build(tmp_path / "checkpoint", tmp_path / "kivi4", "kivi4", max_seq_len=400, quantum=128)
    assert_equals_reference(directory, [250], 70)


@pytest.mark.parametrize(("shape", "freed"), [("gemma3", False), ("gemma3, all layers with a window", True)])
def test_blocks_are_freed_once_no_layer_sees_them(tmp_path: Path, shape: str, freed: bool) -> None:
    """A block holds all layers' tokens: a layer that sees everything keeps it, and prefixes can be reused then."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED[shape])
    directory = build(checkpoint, tmp_path / "engine", "full", max_seq_len=1024, quantum=128, max_batch_size=1)
    assert (read_engine(directory).model.cache_window is not None) == freed
    llm = LLM.from_engine(load_engine(directory, 1))
    assert (llm.cache_sizes.full_blocks < 1024 // 64) == freed
    tokens = np.random.default_rng(0).integers(0, 101, 700).tolist()
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    first, second = (llm.generate([tokens], params)[0].outputs[0].token_ids for _ in range(2))
    assert first == second
    assert (llm.statistics.hit_tokens > 0) != freed
    llm.check_integrity()


def test_layers_that_rotate_differently_share_no_stream_before_rope(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED[PAIR])

    def configure(config: Any) -> tuple[CompressionPlan, BuildConfig]:
        plan = make_plan(config, "kivi4")
        pair = Stream("key", (0, 1), (Segment(64, "int4", "channel"),), merge="mean", basis="pre_rope")
        streams = [stream for stream in plan.streams if stream.part == "value" or stream.layers[0] > 1]
        return CompressionPlan("custom", (pair, *streams)), BuildConfig(max_seq_len=256)

    with pytest.raises(
        UserError, match=r"streams\[0\].basis: 'pre_rope' needs layers with the same RoPE, layers 0 have"
    ):
        build_engine(str(checkpoint), tmp_path / "engine", configure)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_float16_is_refused(tmp_path: Path, backend: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **LAYERED["gemma3"])
    with pytest.raises(UserError, match="expected bfloat16 or float32 for gemma3, whose activations exceed float16's"):
        build(checkpoint, tmp_path / "engine", "full", backend=backend, dtype="float16")
