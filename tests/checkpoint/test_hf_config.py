"""Parsed configs against the transformers configuration classes, and every refusal."""

import json

import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minicache_trt.checkpoint import FAMILIES, parse_config, resolve_config
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError
from minicache_trt.hf_config import OLD_ROPE
from tests.support.rope import own_fields, rope_parameters

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0 + i for i in range(8)], "long_factor": [2.0] * 8}
BY_LAYER = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 12.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0},
}
CLASSES = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "mistral": (MistralConfig, "MistralForCausalLM"),
    "mixtral": (MixtralConfig, "MixtralForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
    "phi3": (Phi3Config, "Phi3ForCausalLM"),
    "gemma2": (Gemma2Config, "Gemma2ForCausalLM"),
    "gemma3_text": (Gemma3TextConfig, "Gemma3ForCausalLM"),
}

MIXTRAL = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}

VARIANTS = [
    ("llama", {}),
    ("llama", {"rope_theta": 500000.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 128}, "rope_theta": 500000}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": {"rope_type": "default"}}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1e6, "original_max_position_embeddings": 64}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}, "rope_theta": 7.0}),
    ("llama", {"num_key_value_heads": None}),
    ("llama", {"head_dim": None}),
    ("llama", {"head_dim": 48}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rms_norm_eps": 1e-05, "bos_token_id": None, "eos_token_id": None}),
    ("llama", {"eos_token_id": [5, 6], "sliding_window": 32}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "attention_bias": True}),
    ("mistral", {"sliding_window": 4096, "num_key_value_heads": 4}),
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 64, "head_dim": 32}),
    ("qwen2", {}),
    ("qwen2", {"eos_token_id": 7, "tie_word_embeddings": True, "sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["sliding_attention"] * 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "layer_types": ["full_attention"] * 2}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 32, "attention_bias": True}),
    ("phi3", {}),
    ("phi3", {"sliding_window": 200, "num_key_value_heads": None}),
    ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}),
    ("phi3", {"rope_scaling": {**LONGROPE, "attention_factor": 1.5}, "original_max_position_embeddings": 64}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    ("gemma2", {}),
    ("gemma2", {"num_hidden_layers": 5, "attn_logit_softcapping": None, "final_logit_softcapping": 7.5}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 144, "head_dim": 32}),
    ("gemma3_text", {"num_hidden_layers": 13, "eos_token_id": [1, 106]}),
    ("gemma3_text", {"num_hidden_layers": 5, "sliding_window_pattern": 2, "rope_local_base_freq": 500}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e5, "sliding_window": 9}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 2, "final_logit_softcapping": 30.0}),
    ("gemma3_text", {"rope_parameters": BY_LAYER, "layer_types": ["sliding_attention", "full_attention"]}),
]


def assert_parity(config: ModelConfig, reference) -> None:
    by_kind = rope_parameters(reference)
    rope = by_kind.get("full_attention", by_kind)
    assert config.num_layers == reference.num_hidden_layers
    assert config.hidden_size == reference.hidden_size
    assert config.intermediate_size == reference.intermediate_size
    assert config.num_heads == reference.num_attention_heads
    assert config.num_kv_heads == reference.num_key_value_heads
    head_dim = getattr(reference, "head_dim", None)
    assert config.head_dim == (head_dim or reference.hidden_size // reference.num_attention_heads)
    assert config.vocab_size == reference.vocab_size
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.bos_token_id == reference.bos_token_id
    eos = reference.eos_token_id
    assert config.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    kind = type(reference)
    bias = kind is Qwen2Config or (kind not in (MistralConfig, MixtralConfig, Phi3Config) and reference.attention_bias)
    assert config.qkv_bias == bias and config.output_bias == (bias and kind is not Qwen2Config)
    assert config.mlp_bias == (kind is LlamaConfig and reference.mlp_bias)
    assert config.qk_norm == (kind in (Qwen3Config, Gemma3TextConfig))
    assert config.num_experts == getattr(reference, "num_local_experts", 0)
    assert config.experts_per_token == getattr(reference, "num_experts_per_tok", 0)
    own = "sliding_attention" if kind is not LlamaConfig else "full_attention"
    kinds = getattr(reference, "layer_types", None) or [own] * config.num_layers
    window = getattr(reference, "sliding_window", None)
    layers = [config.at_layer(layer) for layer in range(config.num_layers)]
    assert [layer.sliding_window for layer in layers] == [
        window if own == "sliding_attention" else None for own in kinds
    ]
    gemma = kind in (Gemma2Config, Gemma3TextConfig)
    assert config.attention_softcap == (reference.attn_logit_softcapping if kind is Gemma2Config else None)
    assert config.logit_softcap == (reference.final_logit_softcapping if gemma else None)
    assert config.attention_scale == pytest.approx(
        (reference.query_pre_attn_scalar if gemma else config.head_dim) ** -0.5
    )
    assert (config.unit_offset_norm, config.output_norms, config.activation == "gelu_tanh") == (gemma,) * 3
    assert config.embedding_scale == (reference.hidden_size**0.5 if gemma else 1.0)
    if kind is Gemma3TextConfig:
        bases = [by_kind[own]["rope_theta"] for own in kinds]
        assert [layer.rope.theta for layer in layers] == bases
        assert config.local_rope is not None and config.local_rope.scaling == "none"
    assert config.rope.theta == rope["rope_theta"]
    assert config.rope.scaling == rope["rope_type"].replace("default", "none")
    for name, key in {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
        "rotary_fraction": "partial_rotary_factor",
        "divisors": "short_factor",
        "long_divisors": "long_factor",
    }.items():
        if key in rope and (name != "original_max_position" or config.rope.scaling != "none"):
            got = getattr(config.rope, name)
            assert (list(got) if isinstance(got, tuple) else got) == rope[key]
    if config.rope.scaling == "longrope":
        assert config.rope.attention_factor == ROPE_INIT_FUNCTIONS["longrope"](reference, "cpu")[1]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
@pytest.mark.parametrize("written_by", ["hand", "transformers"])
def test_parity_with_transformers(tmp_path, raw_config, family, changes, written_by):
    config_class, architecture = CLASSES[family]
    raw = {**raw_config, "architectures": [architecture], "model_type": family, **changes}
    if family in ("mistral", "mixtral") and "num_key_value_heads" not in changes:
        raw["num_attention_heads"] = 8
        raw.pop("num_key_value_heads")
        raw["hidden_size"] = 128
    scaling = raw.get("rope_scaling")
    if OLD_ROPE and (scaling == LLAMA3 or (scaling and "attention_factor" in scaling)):
        pytest.skip("transformers 4 refuses these fields")
    reference = config_class.from_dict(own_fields(json.loads(json.dumps(raw))))
    if written_by == "transformers":
        reference.save_pretrained(tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(raw))
    config = resolve_config(str(tmp_path))
    assert FAMILIES[config.family].model_type == family and config.dtype == "float16"
    assert_parity(config, reference)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_su_is_the_old_name_of_longrope(raw_config):
    """transformers 5 no longer reads it; Phi-3's first checkpoints have it."""
    raw = {**raw_config, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    old = parse_config({**raw, "rope_scaling": {**LONGROPE, "type": "su"}}, path="config.json")
    assert old == parse_config({**raw, "rope_scaling": LONGROPE}, path="config.json")
    assert old.rope.scaling == "longrope" and old.rope.original_max_position == 4096


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"dtype": None}, "float16"),
    ],
)
def test_dtype(write_config, keys, dtype):
    assert resolve_config(str(write_config(**keys))).dtype == dtype


@pytest.mark.parametrize(
    ("config_eos", "generation", "expected"),
    [
        (2, None, (2,)),
        ([2, 3], None, (2, 3)),
        (9, {"eos_token_id": [1, 8, 9]}, (1, 8, 9)),
        ([4, 5], {"eos_token_id": 5}, (5, 4)),
        (4, {"eos_token_id": None}, (4,)),
        (4, {}, (4,)),
        (None, {"eos_token_id": 128009}, (128009,)),
        (None, None, (2,)),
    ],
)
def test_end_of_sequence(write_config, config_eos, generation, expected):
    directory = write_config(eos_token_id=config_eos)
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    assert resolve_config(str(directory)).eos_token_ids == expected


def test_architectures_absent(write_config):
    assert resolve_config(str(write_config(architectures=None, model_type="mistral"))).family == "mistral"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None, "vocab_size": None}, "missing hidden_size, vocab_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: expected int, got '2'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected int, got True"),
        ({"num_hidden_layers": 0}, "num_layers: expected a positive number, got 0"),
        ({"num_attention_heads": 0}, "not a multiple of num_attention_heads 0"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, r"num_heads: expected a multiple of num_kv_heads \(3\)"),
        ({"num_key_value_heads": 0}, "num_kv_heads: expected a positive number, got 0"),
        ({"head_dim": 20}, "head_dim: expected a multiple of 16, got 20"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: expected a positive number, got 0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: expected float, got 'small'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ({"dtype": "float8_e4m3fn"}, "dtype: expected float16, bfloat16, float32, got 'float8_e4m3fn'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected bool, got 'no'"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected an id, a list of ids or null, got '</s>'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized checkpoints \(fp8\) are not supported"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: expected full_attention in every layer",
        ),
        ({**QWEN, "layer_types": ["full_attention", "chunked_attention"]}, "got 'chunked_attention'"),
        ({**QWEN, "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types: expected 2 of them"),
        ({**GEMMA3, "hidden_activation": "gelu"}, "hidden_activation: expected 'gelu_pytorch_tanh', got 'gelu'"),
        ({**GEMMA3, "use_bidirectional_attention": True}, "use_bidirectional_attention: expected false, got True"),
        ({**GEMMA3, "sliding_window_pattern": 0}, "sliding_window_pattern: expected a positive number, got 0"),
        ({**GEMMA3, "query_pre_attn_scalar": 0}, "query_scalar: expected a positive number, got 0"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "text_config: expected dict, got nothing"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "type 'dynamic' is not .*types: default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE type 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: short_factor: expected list, got nothing"),
        (
            {"rope_scaling": {**LONGROPE, "long_factor": [1.0, 0.0]}},
            "long_factor: expected a list of positive numbers, got",
        ),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "experts_per_token: expected 1 to 8, got 9"),
        ({**MIXTRAL, "num_local_experts": "8"}, "num_local_experts: expected int, got '8'"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}}, "rope.divisors: expected 8 numbers, got 7"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor: expected float, got nothing"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor: expected float, got nothing"),
        ({"rope_scaling": {"type": ["linear"]}}, r"RoPE type \['linear'\] is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected dict, got 'linear'"),
        ({"rope_theta": -1.0}, "rope_theta: expected a positive number, got -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, got 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "RoPE that differs between layers"),
    ],
)
def test_refusals(write_config, changes, message):
    directory = write_config(**changes)
    with pytest.raises(UserError, match=message) as caught:
        resolve_config(str(directory))
    assert str(directory / "config.json") in caught.value.cause
    assert caught.value.remedy and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None, "model_type": "qwen9"},
    ],
)
def test_unknown_architecture(write_config, raw_config, changes):
    with pytest.raises(UserError) as caught:
        resolve_config(str(write_config(**changes, rms_norm_eps=1e-5)))
    seen = {**raw_config, **changes}
    assert repr(seen["architectures"]) in caught.value.cause and repr(seen["model_type"]) in caught.value.cause
    assert "llama (LlamaForCausalLM, model_type llama); mistral (MistralForCausalLM" in caught.value.remedy
    assert "what differs" not in caught.value.cause


def test_unknown_architecture_says_what_differs(write_config):
    other = {"architectures": ["OtherForCausalLM"], "model_type": "other", "hidden_activation": "relu2"}
    scaled = {"logit_scale": 0.0625, "layer_types": ["chunked_attention", "full_attention"]}
    with pytest.raises(UserError) as caught:
        resolve_config(str(write_config(**other, **scaled)))
    for part in (
        "it has no rms_norm_eps",
        "logit_scale 0.0625 (output logits are scaled)",
        "hidden_activation 'relu2' (the MLP is neither SwiGLU nor GEGLU)",
        "layer_types chunked_attention (layers of another kind)",
    ):
        assert part in caught.value.cause


def test_parse_does_not_change_its_input(raw_config):
    before = json.dumps(raw_config)
    parse_config(raw_config, path="config.json")
    assert json.dumps(raw_config) == before
