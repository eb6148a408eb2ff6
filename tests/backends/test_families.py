"""Engines of every family against Hugging Face's own model and its own ``generate``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minicache_trt.build import load_engine
from minicache_trt.config import KvCacheConfig
from minicache_trt.engine_directory import QUANTIZED, read_engine
from minicache_trt.hf_reference import reference_for
from minicache_trt.runtime.llm import LLM
from minicache_trt.runtime.request import SamplingParams
from tests.support.checkpoints import SHAPES, make_checkpoint
from tests.support.engines import assert_equals_reference, build
from tests.support.hf_agreement import hugging_face_model

FAMILY_SHAPES = [
    name
    for name, shape in SHAPES.items()
    if shape.get("family", "llama") not in ("llama", "mistral") or shape.get("sliding_window")
]
WINDOWS = [name for name, shape in SHAPES.items() if shape.get("sliding_window")]


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def assert_equals_hugging_face(checkpoint: Path, directory: Path, length: int, backend: str = "onnxruntime") -> None:
    """Logits of random tokens within 1e-3, and greedy tokens equal."""
    model = hugging_face_model(checkpoint)
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


@pytest.mark.parametrize("method", [pytest.param("kivi4", marks=pytest.mark.long), "minicache4"])
@pytest.mark.parametrize("shape", FAMILY_SHAPES)
def test_compressed_without_compiled_kernels(
    tmp_path: Path, shape: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINICACHE_CPU_KERNELS", "0")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70)


@pytest.mark.parametrize("kernels", ["", "0"])
@pytest.mark.parametrize("method", ["full", "kivi4", "minicache4"])
def test_long_ragged_batch_with_a_window(
    tmp_path: Path, method: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows longer and shorter than what stays exact, over quanta, chunks and many demotions."""
    monkeypatch.setenv("MINICACHE_CPU_KERNELS", kernels)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="mistral", sliding_window=300)
    directory = build(checkpoint, tmp_path / "engine", method, max_num_tokens=500, quantum=512, window=100)
    assert_equals_reference(directory, [1700, 600, 64, 5], 200)
    directory = build(checkpoint, tmp_path / "other", method, max_num_tokens=500, quantum=512, window=500)
    assert_equals_reference(directory, [1300, 500], 100)


@pytest.mark.parametrize("method", ["full", "minicache4"])
@pytest.mark.parametrize("shape", WINDOWS)
def test_torch_backend_with_a_window(tmp_path: Path, shape: str, method: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    directory = build(checkpoint, tmp_path / "engine", method, quantum=128)
    assert_equals_reference(directory, [300, 70], 70, backend="torch")


@pytest.mark.parametrize("method", ["full", "minicache4"])
def test_blocks_behind_the_window_are_free(tmp_path: Path, method: str) -> None:
    """A cache for a sequence of any length is that of the window, and it is enough."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="mistral", sliding_window=200)
    sizes = []
    for length in (1024, 3072):
        directory = build(checkpoint, tmp_path / str(length), method, max_seq_len=length, quantum=128, max_batch_size=1)
        llm = LLM.from_engine(load_engine(directory, 1))
        sizes.append(llm.cache_sizes)
        tokens = np.random.default_rng(0).integers(0, 101, length - 300).tolist()
        llm.score([tokens], [length - 500])
        llm.check_integrity()
        assert llm.statistics.preemptions == 0
    assert sizes[0] == sizes[1]
    assert sizes[0].full_blocks + sizes[0].compressed_blocks <= 2 + 200 // 64 + 1 + 4


@pytest.mark.parametrize("method", ["full", "minicache4"])
def test_a_window_changes_nothing_about_independence(tmp_path: Path, method: str) -> None:
    """The same tokens alone, in company, in small chunks, and preempted for want of blocks."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="mistral", sliding_window=150)
    limits = {"max_seq_len": 512, "quantum": 128}
    engines = [
        load_engine(build(checkpoint, tmp_path / str(tokens), method, max_num_tokens=tokens, **limits), 1)
        for tokens in (2048, 33)
    ]
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 101, length).tolist() for length in (300, 130, 64, 7)]
    params = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    alone = LLM.from_engine(engines[0])
    expected = [alone.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    sizes = alone.cache_sizes
    full, compressed = (8, 0) if method == "full" else (sizes.full_blocks, 5)
    budget = sizes.full_block_bytes * full + sizes.compressed_block_bytes * compressed
    tight = LLM.from_engine(engines[1], kv_cache_config=KvCacheConfig(max_bytes=budget))
    for llm in (LLM.from_engine(engines[0]), tight):
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
        llm.check_integrity()
    assert tight.statistics.preemptions > 0


def test_a_window_no_sequence_outgrows_is_dropped(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family="mistral", sliding_window=500)
    assert read_engine(build(checkpoint, tmp_path / "short", "full", max_seq_len=500)).model.sliding_window is None
    assert read_engine(build(checkpoint, tmp_path / "long", "full", max_seq_len=501)).model.sliding_window == 500


@pytest.mark.parametrize("shape", ["phi3", "qwen3, biases, tied", "mixtral"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weight_only_formats(tmp_path: Path, shape: str, weights: str) -> None:
    """Exactly in the torch backend: stacked tensors are quantized part by part."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape] | {"initializer_range": 0.06})
    directory = build(checkpoint, tmp_path / "engine", "kivi4", weights=weights, quantum=128)
    assert_equals_reference(directory, [200], 70, backend="torch")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weight_only_experts_in_onnx_runtime(tmp_path: Path, weights: str) -> None:
    """Up to its 8-bit activations, which may send a token elsewhere; the router itself is not quantized."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES["mixtral"] | {"initializer_range": 0.06})
    directory = build(checkpoint, tmp_path / "engine", "full", weights=weights)
    tokens = np.random.default_rng(1).integers(0, 131, 300).tolist()
    (mine,) = LLM.from_engine(load_engine(directory, 1)).score([tokens])
    reference = reference_for(directory, read_engine(directory)).logits(tokens, len(tokens)).numpy()
    assert np.median(np.abs(mine - reference)) < 0.1 * np.abs(reference).mean()
    with safe_open(directory / QUANTIZED, framework="numpy") as file:
        names = {name.rpartition(".")[0] for name in file.keys()}  # noqa: SIM118 (not iterable itself)
    assert "layers.3.moe.experts.7.down" in names and not any("router" in name for name in names)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_experts_no_token_is_sent_to_are_not_computed(tmp_path: Path, backend: str) -> None:
    """Of one token, those that are not chosen may hold weights that are not numbers."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES["mixtral"] | {"num_hidden_layers": 2})
    model = hugging_face_model(checkpoint)
    with torch.no_grad():
        first = model(torch.tensor([[7]]), output_router_logits=True, use_cache=False)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    chosen = [set(logits.topk(2, -1).indices.flatten().tolist()) for logits in first.router_logits]
    for layer, used in enumerate(chosen):
        for expert in set(range(8)) - used:
            tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    directory = build(checkpoint, tmp_path / "engine", "full", backend=backend)
    (mine,) = LLM.from_engine(load_engine(directory, 1)).score([[7]])
    assert np.abs(mine - first.logits[0].numpy()).max() <= 1e-3


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
