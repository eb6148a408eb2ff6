"""TensorRT-LLM checkpoints: engines built from them compute what the Hugging Face checkpoint they came from does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache_trt.checkpoint import load_checkpoint, resolve_config
from minicache_trt.checkpoint.trtllm_config import Ranks
from minicache_trt.errors import UserError
from minicache_trt.hf_config import set_longrope_divisors
from tests.support.checkpoints import SHAPES, make_checkpoint
from tests.support.engines import build
from tests.support.hf_agreement import assert_same_logits, hugging_face_model
from tests.support.rope import rope_parameters
from tests.support.trtllm import write_trtllm

ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama, one rank": ({}, {}),
    "llama, biases, GQA 6:2, two ranks": (SHAPES["head_dim 80, GQA 6:2, 7 layers, biases"], {"tp": 2}),
    "llama3 rope, two stages of two": (SHAPES["llama3 rope"] | {"num_hidden_layers": 5}, {"tp": 2, "pp": 2}),
    "mistral, two ranks": (SHAPES["mistral"], {"tp": 2}),
    "qwen2, tied, two ranks": (SHAPES["qwen2"], {"tp": 2}),
    "qwen3, one rank": (SHAPES["qwen3"], {}),
    "mixtral, one rank": (SHAPES["mixtral"], {}),
    "mixtral, experts in two groups": (SHAPES["mixtral"], {"tp": 2, "moe_ep": 2}),
    "phi3, partial rotary": (SHAPES["phi3, GQA 4:2, partial rotary, float16"], {"tp": 2}),
    "phi3, LongRoPE": (SHAPES["phi3, LongRoPE"], {}),
}


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ENGINES)
def test_logits(tmp_path: Path, name: str) -> None:
    shape, layout = ENGINES[name]
    source = make_checkpoint(tmp_path / "hf", **shape)
    checkpoint = write_trtllm(source, tmp_path / "trtllm", **layout)
    engine = build(checkpoint, tmp_path / "engine", "full", max_seq_len=512)
    if name != "phi3, LongRoPE":
        assert_same_logits(engine, hugging_face_model(source))
        return
    model = hugging_face_model(source)  # an engine for long contexts uses the long divisors throughout
    set_longrope_divisors(model.config, rope_parameters(model.config)["long_factor"])
    assert_same_logits(engine, type(model).from_pretrained(source, config=model.config, dtype=torch.float32))


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "four ranks share two KV heads": ({}, {"tp": 4}),
    "embedding split by tokens, padded": ({"vocab_size": 101}, {"tp": 2, "parallel_embedding": 0}),
    "embedding split by width": ({}, {"tp": 2, "parallel_embedding": 1}),
    "seven layers in three stages": ({"num_hidden_layers": 7}, {"pp": 3}),
    "biases with shared KV heads": ({"family": "qwen2", "hidden_size": 128}, {"tp": 4}),
    "experts in two groups of two parts": (SHAPES["mixtral"], {"tp": 4, "moe_ep": 2}),
    "experts in two parts": (SHAPES["mixtral"] | {"dtype": "bfloat16"}, {"tp": 2}),
    "float16": ({"dtype": "float16"}, {"tp": 2, "pp": 2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_joined_weights_are_the_original_ones(tmp_path: Path, name: str) -> None:
    """Bit by bit; the router, which the format keeps in 32 bits, by value."""
    shape, layout = LAYOUTS[name]
    source = make_checkpoint(tmp_path / "hf", **shape)
    original = load_checkpoint(str(source))
    joined = load_checkpoint(str(write_trtllm(source, tmp_path / "trtllm", **layout)), work_dir=tmp_path / "work")
    assert joined.config == resolve_config(str(tmp_path / "trtllm"))
    assert joined.weights.keys() >= original.weights.keys()
    for canonical, view in original.weights.items():
        mine = joined.weights[canonical].numpy()
        assert mine.dtype == view.numpy().dtype or "router" in canonical
        assert np.array_equal(mine.astype(np.float32), view.numpy().astype(np.float32)), canonical
    assert joined.format == "TensorRT-LLM checkpoint" and joined.origin == tmp_path / "trtllm"


def test_config_without_tie_keeps_a_missing_output_layer_tied(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", tie_word_embeddings=True)
    directory = write_trtllm(source, tmp_path / "trtllm")
    path = directory / "rank0.safetensors"
    save_file({name: t for name, t in load_file(path).items() if name != "lm_head.weight"}, path)
    assert load_checkpoint(str(directory), work_dir=tmp_path / "work").config.tie_word_embeddings


def test_stages() -> None:
    for layers, stages in ((7, 3), (8, 3), (4, 4), (32, 5)):
        expected = [part.tolist() for part in torch.tensor_split(torch.arange(layers), stages)]
        assert [list(stage) for stage in Ranks(pp=stages).stage_layers(layers)] == expected


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo W4A16_AWQ: quantized"),
        ({"architecture": "GPTForCausalLM"}, "'GPTForCausalLM' is not supported"),
        ({"architecture": "QWenForCausalLM", "qwen_type": "qwen"}, "of type 'qwen' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu' or 'swiglu', got 'gelu'"),
        ({"position_embedding_type": "rope_gptj"}, "position_embedding_type: expected"),
        ({"residual_mlp": True}, "residual_mlp: expected False, got True"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier: expected 1.0, got 2.0"),
        ({"rotary_pct": 0.5}, "rotary_pct: expected 1.0"),
        ({"dtype": None}, "dtype: expected str, got nothing"),
        ({"mapping": {"tp_size": 2}}, "rank1.safetensors missing: mapping says tp_size 2, pp_size 1"),
        ({"mapping": {"tp_size": 0}}, "tp_size: expected a positive number, got 0"),
        ({"mapping": {"tp_size": 4, "moe_tp_size": 3, "moe_ep_size": 1}}, "moe_tp_size x moe_ep_size = 4"),
        ({"intermediate_size": 97}, "joins to"),
        ({"num_attention_heads": 8}, "expected 384 rows"),
        ({"num_hidden_layers": 5}, "transformer.layers.4.input_layernorm.weight is missing"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], cause: str) -> None:
    directory = write_trtllm(make_checkpoint(tmp_path / "hf"), tmp_path / "trtllm", **changes)
    with pytest.raises(UserError) as error:
        load_checkpoint(str(directory), work_dir=tmp_path / "work")
    assert cause in error.value.cause and error.value.remedy
    assert "\n" not in error.value.cause


def test_an_engine_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_config": {}, "build_config": {}}))
    with pytest.raises(UserError, match="a built TensorRT-LLM engine"):
        resolve_config(str(tmp_path))


def test_quantized_weights_in_a_config_that_does_not_say_so(tmp_path: Path) -> None:
    directory = write_trtllm(make_checkpoint(tmp_path / "hf"), tmp_path / "trtllm")
    path = directory / "rank0.safetensors"
    tensors = load_file(path)
    tensors["transformer.layers.1.mlp.proj.weight"] = tensors["transformer.layers.1.mlp.proj.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"layers.1.mlp.proj.weight: expected dtype .* got I8"):
        load_checkpoint(str(directory), work_dir=tmp_path / "work")
