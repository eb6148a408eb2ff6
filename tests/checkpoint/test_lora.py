"""LoRA adapters merged at build, against peft's own ``merge_and_unload``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache_trt.build import build_engine
from minicache_trt.checkpoint import FAMILIES, load_checkpoint
from minicache_trt.compression.methods import make_plan
from minicache_trt.config import BuildConfig
from minicache_trt.errors import UserError
from tests.support.checkpoints import make_checkpoint
from tests.support.hf_agreement import assert_same_logits, hugging_face_model
from tests.support.int4_writer import write_int4
from tests.support.trtllm import write_trtllm

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({}, {"target_modules": ATTENTION, "r": 4, "lora_alpha": 12}),
    "all linear layers, rslora": (
        {"attention_bias": True},
        {"target_modules": "all-linear", "r": 8, "lora_alpha": 6, "use_rslora": True},
    ),
    "patterns of ranks and alphas": (
        {},
        {
            "target_modules": ["q_proj", "down_proj"],
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 6},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "phi3, stacked modules": (
        {"family": "phi3", "head_dim": None, "hidden_size": 128},
        {"target_modules": ["qkv_proj", "gate_up_proj"], "r": 4, "lora_alpha": 16},
    ),
    "embedding, output layer, saved norm": (
        {},
        {"target_modules": ["embed_tokens", "lm_head"], "modules_to_save": ["norm"], "r": 4, "lora_alpha": 4},
    ),
    "tied embedding": (
        {"tie_word_embeddings": True},
        {"target_modules": ["embed_tokens", "up_proj"], "r": 4, "lora_alpha": 4},
    ),
    "biases": ({"attention_bias": True}, {"target_modules": ATTENTION, "r": 2, "lora_alpha": 8, "bias": "lora_only"}),
}


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)


def make_adapter(source: Path, directory: Path, settings: dict[str, Any]) -> Any:
    """Write a random adapter; returns the model with it merged by peft."""
    torch.manual_seed(1)
    model = peft.get_peft_model(hugging_face_model(source), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or (name.endswith("bias") and parameter.requires_grad):
            torch.nn.init.normal_(parameter, 1.0 if "modules_to_save" in name else 0.0, 0.15)
    model.save_pretrained(directory)
    return model.merge_and_unload()


@pytest.mark.parametrize("name", ADAPTERS)
def test_weights_and_logits(tmp_path: Path, name: str) -> None:
    shape, settings = ADAPTERS[name]
    source = make_checkpoint(tmp_path / "hf", **shape)
    merged = make_adapter(source, tmp_path / "adapter", settings)

    def configure(config: Any) -> Any:
        return make_plan(config, "full"), BuildConfig(max_seq_len=512)

    engine = build_engine(str(source), tmp_path / "engine", configure, lora_dir=tmp_path / "adapter").directory
    mine, original = load_checkpoint(str(engine / "checkpoint")), load_checkpoint(str(source))
    family, state = FAMILIES[mine.config.family], merged.state_dict()
    changed = 0
    for canonical, view in mine.weights.items():
        if family.name != "phi3":
            assert np.allclose(view.numpy(), state[family.hf_name(canonical)].numpy(), atol=1e-5), canonical
        changed += not np.array_equal(view.numpy(), original.weights[canonical].numpy())
    assert changed > 1
    assert_same_logits(engine, merged, limit=2e-3)


def test_into_a_checkpoint_of_another_format(tmp_path: Path) -> None:
    """The adapter's names are Hugging Face's, whatever the checkpoint's are."""
    source = make_checkpoint(tmp_path / "hf")
    merged = make_adapter(source, tmp_path / "adapter", ADAPTERS["attention"][1]).state_dict()
    directory = write_trtllm(source, tmp_path / "trtllm", tp=2)
    mine = load_checkpoint(str(directory), lora_dir=tmp_path / "adapter", work_dir=tmp_path / "work")
    for canonical, view in mine.weights.items():
        assert np.allclose(view.numpy(), merged[FAMILIES["llama"].hf_name(canonical)].numpy(), atol=1e-5)


def test_sixteen_bit_weights_are_merged_in_floats(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", dtype="float16")
    merged = make_adapter(source, tmp_path / "adapter", ADAPTERS["attention"][1]).state_dict()
    mine = load_checkpoint(str(source), lora_dir=tmp_path / "adapter", work_dir=tmp_path / "work")
    for canonical, view in mine.weights.items():
        expected = merged[FAMILIES["llama"].hf_name(canonical)].half().float().numpy()
        assert view.dtype == "float16" and np.allclose(view.numpy().astype(np.float32), expected, rtol=1e-3, atol=1e-6)


def test_a_pickled_adapter(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf")
    merged = make_adapter(source, tmp_path / "adapter", ADAPTERS["attention"][1]).state_dict()
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter" / "adapter_model.bin")
    weights.unlink()
    mine = load_checkpoint(str(source), lora_dir=tmp_path / "adapter", work_dir=tmp_path / "work")
    expected = merged["model.layers.0.self_attn.q_proj.weight"].numpy()
    assert np.allclose(mine.weights["layers.0.attention.q.weight"].numpy(), expected, atol=1e-5)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, directory / "adapter_model.safetensors")

    return edit


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (edit_config(peft_type="IA3"), "peft_type: expected 'LORA', got 'IA3'"),
        (edit_config(use_dora=True), "use_dora is not supported"),
        (edit_config(target_parameters=["mlp.experts"]), "target_parameters is not supported"),
        (edit_config(lora_alpha="16"), "lora_alpha: expected float, got '16'"),
        (edit_weights(lambda t: t.pop(A)), "q_proj.lora_B.weight is alone of its pair"),
        (
            edit_weights(lambda t: t.update({A: t[A][:, :5].clone()})),
            "q_proj is [128, 4] x [4, 5], its weight [128, 64]",
        ),
        (edit_weights(lambda t: t.update({A.replace("q_proj", "qq"): t[A].clone()})), "which the model does not have"),
        (edit_weights(lambda t: t.update({"magnitude": t[A].clone()})), "nothing to merge magnitude into"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
        (lambda path: (path / "adapter_config.json").unlink(), "no adapter_config.json"),
    ],
)
def test_refusals(tmp_path: Path, damage: Callable[[Path], Any], cause: str) -> None:
    source = make_checkpoint(tmp_path / "hf")
    make_adapter(source, tmp_path / "adapter", ADAPTERS["attention"][1])
    damage(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        load_checkpoint(str(source), lora_dir=tmp_path / "adapter", work_dir=tmp_path / "work")
    assert cause in error.value.cause and error.value.remedy


def test_an_adapter_for_quantized_weights(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf")
    make_adapter(source, tmp_path / "adapter", ADAPTERS["attention"][1])
    write_int4(source, tmp_path / "int4", "awq")
    with pytest.raises(UserError, match="cannot be merged into the 4-bit weights of the AWQ checkpoint"):
        load_checkpoint(str(tmp_path / "int4"), lora_dir=tmp_path / "adapter", work_dir=tmp_path / "work")
