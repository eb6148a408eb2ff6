"""Every weight format, from the command line's names to logits on every backend that runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache_trt.build import build_engine, load_engine
from minicache_trt.checkpoint import load_checkpoint
from minicache_trt.cli.options import weight_format
from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BuildConfig
from minicache_trt.engine_directory import read_engine
from minicache_trt.errors import UserError
from minicache_trt.evaluation.contenders import Memory
from minicache_trt.hf_reference import reference_for
from minicache_trt.quantization.store import WeightOptions, codes_of, weight_bytes
from minicache_trt.runtime.llm import LLM
from tests.checkpoint.test_int4 import with_float_activations
from tests.support.checkpoints import LAYERED, make_checkpoint
from tests.support.hf_agreement import hugging_face_model

TOKENS = (np.arange(60) * 7 % 101).tolist()
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def build(source: Path, output: Path, weights: str, options: WeightOptions | None = None, **limits: Any) -> Path:
    config = BuildConfig(2, 128, 128, weights, **limits)
    plan = lambda model: (make_plan(model, "full"), config)  # noqa: E731
    return build_engine(str(source), output, plan, weights=options or WeightOptions(threads=2)).directory


def logits(directory: Path, backend: str) -> np.ndarray:
    llm = LLM.from_engine(load_engine(directory, 1, backend))
    return llm.score([TOKENS], [len(TOKENS)])[0]


@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("shape", [{}, {"family": "phi3", "head_dim": None, "num_key_value_heads": 4}])
def test_cast(tmp_path: Path, weights: str, shape: dict[str, Any]) -> None:
    """Half the bytes, and what Hugging Face computes in float32 with weights rounded by PyTorch."""
    source = make_checkpoint(tmp_path / "hf", **shape)
    directory = build(source, tmp_path / "engine", weights)
    stored = load_checkpoint(str(directory / "checkpoint"))
    name = str(TYPES[weights]).removeprefix("torch.")
    assert {view.dtype for view in stored.weights.values()} == {name} and stored.config.dtype == name
    files = [path for path in directory.rglob("*") if path.suffix == ".safetensors"]
    assert [path.name for path in files] == ["model.safetensors"]
    assert weight_bytes(directory) == sum(view.nbytes for view in load_checkpoint(str(source)).weights.values()) // 2
    model = hugging_face_model(source)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(TYPES[weights]).float()
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    for backend in ("onnxruntime", "torch"):
        assert np.abs(logits(directory, backend) - expected).max() < 1e-3, backend


def test_cast_of_what_is_there_already_links(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", dtype="float16")
    for weights in ("fp16", "fp32"):
        directory = build(source, tmp_path / weights, weights)
        assert (directory / "checkpoint" / "model.safetensors").stat().st_ino == (
            source / "model.safetensors"
        ).stat().st_ino


def test_beyond_float16(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = BuildConfig(2, 128, 128, "fp16")
    result = build_engine(str(source), tmp_path / "engine", lambda model: (make_plan(model, "full"), config))
    assert "clipped in model.layers.1.mlp.up_proj.weight" in " ".join(result.notes)
    assert load_checkpoint(str(tmp_path / "engine/checkpoint")).weights["layers.1.mlp.up.weight"].numpy()[0, 0] == 65504


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_damaged_weights_are_named(tmp_path: Path, weights: str) -> None:
    from safetensors.torch import load_file, save_file

    source = make_checkpoint(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] = torch.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"infinities or NaN: .*1\.mlp\.up_proj.*, .*2\.self_attn\.q_proj"):
        build(source, tmp_path / "engine", weights)
    assert not (tmp_path / "engine").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("weights", "size"), [("int8", 64), ("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128)])
def test_group_sizes(tmp_path: Path, weights: str, size: int) -> None:
    """128 is more than some layers have inputs. Backends agree with Hugging Face's model of the same weights."""
    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=2)
    directory = build(source, tmp_path / "engine", weights, group_size=size)
    with_float_activations(directory)
    with torch.inference_mode():
        expected = reference_for(directory, read_engine(directory)).uncompressed_logits(TOKENS).numpy()
    for backend in ("onnxruntime", "torch"):
        assert np.abs(logits(directory, backend) - expected).max() < 1e-3, backend


SOURCES: dict[str, dict[str, Any]] = {
    "tied, biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mixtral": {"family": "mixtral", "num_local_experts": 4},
    "phi3": {"family": "phi3", "head_dim": None, "num_key_value_heads": 4, "hidden_size": 128},
    "gemma2, caps": LAYERED["gemma2, scale 20, caps 5 and 3, GQA 6:2, bfloat16"],
    "gemma3, tied": LAYERED["gemma3"],
}


class Words:
    """A tokenizer of so many words."""

    bos_token_id = eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [sum(map(ord, word)) % 101 for word in text.split()]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("minicache_trt.compression.calibration_text.load_tokenizer", lambda directory: Words())
    path = tmp_path / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text(" ".join("abcdefghij"[i : i + 3] * (1 + i) for i in rng.integers(0, 8, 4000)))
    return path


@pytest.mark.parametrize("name", SOURCES)
def test_awq_engines(tmp_path: Path, text: Path, name: str) -> None:
    """Norms, biases and routers that scales went into are the engine's on every backend."""
    source = make_checkpoint(tmp_path / "hf", **{**SOURCES[name], "num_hidden_layers": 2, "vocab_size": 101})
    options = WeightOptions(text, samples=2, threads=1)
    directory = build(source, tmp_path / "engine", "int4_awq", options)
    with_float_activations(directory)
    info = read_engine(directory)
    with torch.inference_mode():
        expected = reference_for(directory, info).uncompressed_logits(TOKENS).numpy()
    for backend in ("onnxruntime", "torch"):
        assert np.abs(logits(directory, backend) - expected).max() < 1e-3, backend
    # Another engine of the same checkpoint takes its codes.
    other = build(directory / "checkpoint", tmp_path / "other", "int4_awq", codes_of(directory))
    assert (other / "quantized.safetensors").samefile(directory / "quantized.safetensors")
    with pytest.raises(UserError, match="int4_awq need text to calibrate on"):
        build(source, tmp_path / "without", "int4_awq")


def test_awq_loses_less(tmp_path: Path, text: Path) -> None:
    """On a model some of whose channels are large, as trained ones' are."""
    from safetensors.torch import load_file, save_file

    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=3)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::13] *= 12
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    exact = logits(build(source, tmp_path / "exact", "fp32"), "torch")
    options = WeightOptions(text, samples=4, threads=1)
    errors = {}
    for weights in ("int4", "int4_awq"):
        directory = build(source, tmp_path / weights, weights, options, group_size=64)
        errors[weights] = float(np.square(logits(directory, "torch") - exact).mean())
    assert errors["int4_awq"] < 0.97 * errors["int4"]


@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_host_kernels(tmp_path: Path, host_library: Any, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.setenv("MINICACHE_LIBRARY", str(host_library.path))
    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=2, head_dim=64)
    directory = build(source, tmp_path / "engine", weights)
    assert np.abs(logits(directory, "host-kernels") - logits(directory, "torch")).max() < 1e-3


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int4_awq"])
def test_ranks_of_tensorrt_refuse(tmp_path: Path, weights: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=1)
    with pytest.raises(UserError, match=f"TensorRT engines of 2 ranks have no {weights} weights"):
        build(source, tmp_path / "engine", weights, backend="tensorrt-rtx", tp_size=2)


def test_names_of_other_tools() -> None:
    assert [weight_format(name) for name in ("auto", "half", "bfloat16", "awq", "int4_wo", "int4_awq", " int8 ")] == [
        "fp32",
        "fp16",
        "bf16",
        "int4_awq",
        "int4",
        "int4_awq",
        "int8",
    ]
    with pytest.raises(UserError, match="expected one of fp32, fp16, bf16, int8, int4, int4_awq, fp8, got 'int5'"):
        weight_format("int5")


def test_memory_of_weights(tmp_path: Path) -> None:
    """4 bits and a float32 scale for 32 inputs; embedding and norms stay."""
    source = make_checkpoint(tmp_path / "hf", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    config = BuildConfig(2, 128, 128, "int4")
    with LLM(str(source), method="full", build_config=config, num_threads=1) as llm:
        memory = Memory.of(llm)
    views = load_checkpoint(str(source)).weights
    linears = [view for name, view in views.items() if len(view.shape) == 2 and name != "embed.weight"]
    expected = sum(view.nbytes for view in views.values()) - sum(view.nbytes for view in linears)
    expected += sum(view.shape[0] * view.shape[1] * 5 // 8 for view in linears)
    assert (memory.weights, memory.weight_bytes) == ("int4", expected)
