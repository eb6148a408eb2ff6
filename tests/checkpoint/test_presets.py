"""Presets against transformers, against published parameter counts, and against a download that must not happen."""

import math

import huggingface_hub
import pytest
from transformers import AutoConfig

from minicache_trt.checkpoint import FAMILIES, PRESETS, list_presets, resolve_config, weight_shapes
from tests.support.rope import own_fields, rope_parameters

PARAMETERS = {
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "phi3-mini-4k-instruct": 3_821_079_552,
    "phi3-medium-4k-instruct": 13_960_238_080,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
}


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a preset's config needs no download")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_parameter_counts(name, expected):
    assert sum(math.prod(shape) for shape in weight_shapes(resolve_config(name)).values()) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_parses_as_transformers_does(name):
    preset = PRESETS[name]
    config = resolve_config(name.upper())
    reference = AutoConfig.for_model(**own_fields(preset.raw_config)).get_text_config()
    assert config == preset.config
    assert FAMILIES[config.family].model_type == reference.model_type
    head_dim = getattr(reference, "head_dim", None)
    assert config.head_dim == (head_dim or reference.hidden_size // reference.num_attention_heads)
    assert config.sliding_window == getattr(reference, "sliding_window", None)
    rope = rope_parameters(reference)
    rope = rope.get("full_attention", rope)
    assert config.rope.theta == rope["rope_theta"] and config.rope.factor == rope.get("factor", 1.0)
    if config.family.startswith("gemma"):
        full = [layer for layer, kind in enumerate(reference.layer_types) if kind == "full_attention"]
        assert config.full_layers == tuple(full)
        assert config.query_scalar == reference.query_pre_attn_scalar
    assert preset.hub_id.count("/") == 1


def test_listing_is_sorted_and_complete():
    names = [preset.name for preset in list_presets()]
    assert names == sorted(PRESETS)


def test_chat_models_share_the_shape_of_their_base():
    for name in ("llama2-7b", "llama3-8b", "llama3.1-8b", "llama3.2-1b"):
        base, chat = resolve_config(name), resolve_config(f"{name}-{'chat' if 'llama2' in name else 'instruct'}")
        assert weight_shapes(base) == weight_shapes(chat) and base.rope == chat.rope
