"""AWQ and GPTQ checkpoints: engines compute what Hugging Face's model computes with the weights the codes stand for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache_trt.benchmark.peers import hugging_face
from minicache_trt.build import build_engine
from minicache_trt.checkpoint import FAMILIES, load_checkpoint
from minicache_trt.checkpoint.quantize import iterate_dequantized
from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BuildConfig
from minicache_trt.engine_directory import read_engine, write_config
from minicache_trt.errors import UserError
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import assert_equals_reference, build
from tests.support.hf_agreement import assert_same_logits, engine_logits, hugging_face_model, logits
from tests.support.int4_writer import write_int4

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "initializer_range": 0.06,
}
PACKINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "awq, groups of 32": (WIDE, {"method": "awq", "group": 32}),
    "awq, groups of 128": (WIDE, {"method": "awq", "group": 128}),
    "gptq, groups of 64": (WIDE, {"method": "gptq", "group": 64}),
    "gptq, symmetric, float16": (WIDE | {"dtype": "float16"}, {"method": "gptq", "group": 128, "symmetric": True}),
    "gptq v2, groups of 32": (WIDE, {"method": "gptq", "group": 32, "v2": True}),
    "gptq, one group": (WIDE, {"method": "gptq", "group": -1}),
    "awq, qwen2, tied": (WIDE | {"family": "qwen2", "tie_word_embeddings": True}, {"method": "awq", "group": 64}),
    "gptq, phi3": (WIDE | {"family": "phi3"}, {"method": "gptq", "group": 64}),
    "awq, mixtral": (WIDE | {"family": "mixtral", "num_local_experts": 4}, {"method": "awq", "group": 128}),
}


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def quantized(tmp_path: Path, shape: dict[str, Any], packing: dict[str, Any]) -> tuple[Path, Any, dict[str, Any]]:
    """Its directory, Hugging Face's model with the weights it stands for, and those weights by name."""
    source = make_checkpoint(tmp_path / "hf", **shape)
    floats = write_int4(source, tmp_path / "int4", **packing)
    rounded = tmp_path / "rounded"
    rounded.mkdir()
    (rounded / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in floats.items()}, rounded / "model.safetensors")
    return tmp_path / "int4", hugging_face_model(rounded), floats


def _nodes(part: Any) -> Iterator[onnx.NodeProto]:
    """Nodes of a graph or function, those of branches included."""
    for node in part.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def with_float_activations(engine: Path) -> None:
    """Make an engine's MatMulNBits compute in floats, so that what is left of its error is an error."""
    info = read_engine(engine)
    graph = onnx.load(engine / "decoder.onnx", load_external_data=False)
    found = [node for part in (graph.graph, *graph.functions) for node in _nodes(part) if node.op_type == "MatMulNBits"]
    assert found
    for node in found:
        next(attribute for attribute in node.attribute if attribute.name == "accuracy_level").i = 0
    onnx.save(graph, engine / "decoder.onnx")
    (engine / "config.json").unlink()
    write_config(engine, info)


@pytest.mark.parametrize("name", PACKINGS)
def test_weights(tmp_path: Path, name: str) -> None:
    """By value; exactly, but for the 16 bits the floats were rounded to."""
    shape, packing = PACKINGS[name]
    floats = write_int4(make_checkpoint(tmp_path / "hf", **shape), tmp_path / "int4", **packing)
    checkpoint = load_checkpoint(str(tmp_path / "int4"), work_dir=tmp_path / "work")
    assert checkpoint.int4 is not None
    family = FAMILIES[checkpoint.config.family]
    linears = dict(iterate_dequantized(checkpoint.int4, checkpoint.weights))
    parts: dict[str, list[str]] = {}
    for canonical in linears:
        parts.setdefault(family.hf_name(f"{canonical}.weight"), []).append(canonical)
    assert len(parts) >= 4 * checkpoint.config.num_layers
    for hf, names in parts.items():
        order = [".q", ".k", ".v", ".gate", ".up"]
        names.sort(key=lambda name: next((i for i, end in enumerate(order) if name.endswith(end)), 0))
        tolerance = 1e-3 if floats[hf].dtype == torch.float16 else 0
        mine = np.concatenate([linears[name] for name in names])
        assert np.allclose(mine, floats[hf].float().numpy(), rtol=tolerance, atol=tolerance), hf


QUICK = ("awq, groups of 32", "gptq, symmetric, float16", "gptq, phi3")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in PACKINGS]
)
def test_logits(tmp_path: Path, name: str) -> None:
    """By both backends, by ONNX Runtime also with the 8-bit activations it really has."""
    shape, packing = PACKINGS[name]
    directory, model, floats = quantized(tmp_path, shape, packing)
    engine = build(directory, tmp_path / "engine", "full", max_seq_len=512)
    assert load_checkpoint(str(engine / "checkpoint")).int4 == engine / "quantized.safetensors"
    limit = 5e-3 if floats["model.norm.weight"].dtype == torch.float16 else 1e-3
    assert_same_logits(engine, model, limit, backend="torch")
    theirs = logits(model)
    assert np.median(np.abs(engine_logits(engine) - theirs)) < 0.1 * np.abs(theirs).mean()
    with_float_activations(engine)
    assert_same_logits(engine, model, limit)


def test_the_reference_sees_the_same_weights(tmp_path: Path) -> None:
    """`compare` and the reference read the engine's own codes."""
    directory, _, _ = quantized(tmp_path, WIDE, {"method": "awq", "group": 64})
    engine = build(directory, tmp_path / "engine", "kivi4", max_seq_len=512, backend="torch")
    assert_equals_reference(engine, [200], 20, backend="torch")


def test_build_keeps_the_codes(tmp_path: Path) -> None:
    directory, _, _ = quantized(tmp_path, WIDE, {"method": "gptq", "group": 128, "symmetric": True})
    engine = build(directory, tmp_path / "engine", "full", max_seq_len=512)
    assert read_engine(engine).build.weights == "int4"
    header = load_file(engine / "quantized.safetensors")
    assert header["layers.0.attention.q.codes"].shape == (256, 2, 64)
    assert not any(name.endswith("zeros") for name in header)
    config = json.loads((engine / "checkpoint" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "layers.0.self_attn" not in "".join(load_file(engine / "checkpoint" / "model.safetensors"))

    def configure(config: Any) -> Any:
        return make_plan(config, "full"), BuildConfig(max_seq_len=512, weights="int8")

    with pytest.raises(UserError, match="weights int8: the GPTQ checkpoint holds 4-bit weights"):
        build_engine(str(directory), tmp_path / "other", configure)
    with pytest.raises(UserError, match="4-bit weights in a form that transformers does not read"):
        hugging_face(engine, 1, 16)


@pytest.mark.parametrize(
    ("packing", "cause"),
    [
        ({"method": "gptq", "order": True}, "activation order"),
        ({"method": "gptq", "bits": 8}, "quantization_config.bits: expected 4, got 8"),
        ({"method": "gptq", "group_size": 48}, "quantization_config.group_size: expected 32, 64"),
        ({"method": "gptq", "group_size": 64}, "model.layers.0.self_attn.q_proj.qzeros: expected I32 [4, 32], got I32"),
        ({"method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format: expected 'gptq' or 'gptq_v2'"),
        ({"method": "awq", "version": "gemv"}, "quantization_config.version: expected 'gemm', got 'gemv'"),
        ({"method": "awq", "quant_method": "bitsandbytes"}, "quantized checkpoints (bitsandbytes) are not supported"),
    ],
)
def test_refusals(tmp_path: Path, packing: dict[str, Any], cause: str) -> None:
    write_int4(make_checkpoint(tmp_path / "hf", **WIDE), tmp_path / "int4", **packing)
    with pytest.raises(UserError) as error:
        load_checkpoint(str(tmp_path / "int4"), work_dir=tmp_path / "work")
    assert cause in error.value.cause and error.value.remedy


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    write_int4(make_checkpoint(tmp_path / "hf", **WIDE), tmp_path / "int4", "gptq")
    path = tmp_path / "int4" / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.scales"
    save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)
    with pytest.raises(UserError, match=f"weights are missing: {name}"):
        load_checkpoint(str(tmp_path / "int4"), work_dir=tmp_path / "work")


def test_nothing_is_quantized(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf")
    path = source / "config.json"
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 128}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    with pytest.raises(UserError, match="no weight is quantized"):
        load_checkpoint(str(source), work_dir=tmp_path / "work")


def test_zero_points_of_the_second_format_read_as_the_first(tmp_path: Path) -> None:
    """A zero point of 15 has no successor: the format named in config.json cannot be right."""
    packing = {"method": "gptq", "v2": True, "checkpoint_format": "gptq"}
    source = make_checkpoint(tmp_path / "hf", **WIDE)
    path = source / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.mlp.up_proj.weight"] = -state["model.layers.0.mlp.up_proj.weight"].abs()
    save_file(state, path)
    write_int4(source, tmp_path / "int4", **packing)
    with pytest.raises(UserError, match="zero points up to 16"):
        load_checkpoint(str(tmp_path / "int4"), work_dir=tmp_path / "work")
