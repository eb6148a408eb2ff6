"""Canonical weights against the state dict of the transformers model."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache_trt.checkpoint import FAMILIES, load_checkpoint, weight_shapes
from minicache_trt.errors import UserError

VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "head_dim": 32}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("mistral", {}),
    ("mistral", {"tie_word_embeddings": True, "sliding_window": 128}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
    ("gemma2", {"head_dim": 32, "tie_word_embeddings": False}),
    ("gemma3_text", {"head_dim": 32}),
]
STACKED = [("phi3", {}), ("phi3", {"num_key_value_heads": 4, "tie_word_embeddings": True, "intermediate_size": 80})]


@pytest.mark.parametrize(("family", "config"), VARIANTS)
def test_every_parameter_is_bound_once(save_model, family, config):
    directory, model = save_model(family, **config)
    checkpoint = load_checkpoint(str(directory))
    parameters = dict(model.named_parameters())
    assert {view.name for view in checkpoint.weights.values()} == set(parameters)
    assert len(checkpoint.weights) == len(parameters)
    row = FAMILIES[checkpoint.config.family]
    for canonical, view in checkpoint.weights.items():
        assert view.name == row.hf_name(canonical)
        assert torch.equal(view.torch(), parameters[view.name])
    assert ("lm_head.weight" in checkpoint.weights) is not checkpoint.config.tie_word_embeddings


@pytest.mark.parametrize(("family", "config"), STACKED)
def test_stacked_parameters_are_views_of_their_rows(save_model, family, config):
    """Of the checkpoint's own bytes, in order, all rows once."""
    directory, model = save_model(family, **config)
    checkpoint = load_checkpoint(str(directory))
    assert {name: view.shape for name, view in checkpoint.weights.items()} == weight_shapes(checkpoint.config)
    parts: dict[str, list] = {}
    for view in checkpoint.weights.values():
        assert view.file == directory / "model.safetensors"
        parts.setdefault(view.name, []).append(view)
    parameters = dict(model.named_parameters())
    assert parts.keys() == parameters.keys()
    for name, views in parts.items():
        assert torch.equal(torch.cat([view.torch() for view in views]), parameters[name])
        assert all(a.offset + a.nbytes == b.offset for a, b in itertools.pairwise(views))
    layer = model.model.layers[1]
    heads, kv_heads, dim = (getattr(checkpoint.config, name) for name in ("num_heads", "num_kv_heads", "head_dim"))
    q, k, v = layer.self_attn.qkv_proj.weight.split([heads * dim, kv_heads * dim, kv_heads * dim])
    gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
    expected = {"attention.q": q, "attention.k": k, "attention.v": v, "mlp.gate": gate, "mlp.up": up}
    for name, weight in expected.items():
        assert torch.equal(checkpoint.weights[f"layers.1.{name}.weight"].torch(), weight)


def test_experts(save_model):
    """Of one tensor each, as on the hub; transformers 5 stacks them when it loads them."""
    directory, model = save_model("mixtral", num_local_experts=5, num_experts_per_tok=3)
    checkpoint = load_checkpoint(str(directory))
    assert (checkpoint.config.num_experts, checkpoint.config.experts_per_token) == (5, 3)
    assert {view.name for view in checkpoint.weights.values()} == load_file(directory / "model.safetensors").keys()
    layer = model.model.layers[1]
    if hasattr(layer, "block_sparse_moe"):  # transformers 4
        moe = layer.block_sparse_moe
        gates_and_ups = [torch.cat([expert.w1.weight, expert.w3.weight]) for expert in moe.experts]
        downs = [expert.w2.weight for expert in moe.experts]
    else:
        moe = layer.mlp
        gates_and_ups, downs = moe.experts.gate_up_proj, moe.experts.down_proj
    assert torch.equal(checkpoint.weights["layers.1.moe.router.weight"].torch(), moe.gate.weight)
    for expert in range(5):
        gate, up, down = (
            checkpoint.weights[f"layers.1.moe.experts.{expert}.{part}.weight"].torch()
            for part in ("gate", "up", "down")
        )
        assert torch.equal(torch.cat([gate, up]), gates_and_ups[expert])
        assert torch.equal(down, downs[expert])


def test_canonical_names(save_model):
    directory, model = save_model(attention_bias=True, mlp_bias=True)
    weights, layer = load_checkpoint(str(directory)).weights, model.model.layers[1]
    modules = {
        "embed": model.model.embed_tokens,
        "layers.1.input_norm": layer.input_layernorm,
        "layers.1.attention.q": layer.self_attn.q_proj,
        "layers.1.attention.k": layer.self_attn.k_proj,
        "layers.1.attention.v": layer.self_attn.v_proj,
        "layers.1.attention.o": layer.self_attn.o_proj,
        "layers.1.post_attention_norm": layer.post_attention_layernorm,
        "layers.1.mlp.gate": layer.mlp.gate_proj,
        "layers.1.mlp.up": layer.mlp.up_proj,
        "layers.1.mlp.down": layer.mlp.down_proj,
        "norm": model.model.norm,
        "lm_head": model.lm_head,
    }
    assert {name for name in weights if not name.startswith("layers.0.")} == {
        f"{name}.{leaf}" for name, module in modules.items() for leaf, _ in module.named_parameters()
    }
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters():
            assert torch.equal(weights[f"{name}.{leaf}"].torch(), parameter)


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_unused_tensors_are_ignored(save_model):
    directory, model = save_model(tie_word_embeddings=True)
    expected = load_checkpoint(str(directory)).weights.keys()

    def add(tensors):
        tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.steps"] = torch.ones(1, dtype=torch.int64)

    edit_weights(directory, add)
    assert load_checkpoint(str(directory)).weights.keys() == expected


def test_mixed_dtypes(save_model):
    directory, _ = save_model()

    def mix(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()

    edit_weights(directory, mix)
    checkpoint = load_checkpoint(str(directory))
    assert checkpoint.weights["norm.weight"].dtype == "float16"
    assert checkpoint.weights["embed.weight"].dtype == "bfloat16"
    assert checkpoint.weights["lm_head.weight"].dtype == "float32"
    assert checkpoint.config.dtype == "float32"


def test_dtype_comes_from_the_weights_where_the_config_has_none(save_model):
    directory, _ = save_model(dtype="bfloat16")
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    raw.pop("dtype")
    path.write_text(json.dumps(raw))
    assert load_checkpoint(str(directory)).config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 of 21 weights are missing: model.norm.weight "),
        (
            lambda t: [t.pop(name) for name in list(t) if ".1." in name],
            r"9 of 21 weights are missing: (model\.layers\.1\.\S+, ){8}model\.layers\.1\.\S+ ",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 96)}),
            r"model.layers.1.mlp.up_proj.weight: expected shape \[96, 64\] from config.json, got \[64, 96\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
            "model.norm.weight: expected dtype float16, bfloat16, float32, got F8_E4M3",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config(save_model, change, message):
    directory, _ = save_model()
    edit_weights(directory, change)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(str(directory))
    assert caught.value.remedy


def test_order_is_that_of_use(save_model):
    directory, _ = save_model()
    checkpoint = load_checkpoint(str(directory))
    names = list(weight_shapes(checkpoint.config))
    assert list(checkpoint.weights) == names
    assert names[0] == "embed.weight" and names[-2:] == ["norm.weight", "lm_head.weight"]
    assert names.index("layers.0.post_attention_norm.weight") == names.index("layers.0.mlp.gate.weight") - 1
