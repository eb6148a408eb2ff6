"""Models by a short name, with the shape in their hub config.json, so that planning one needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicache_trt.checkpoint.hf_config import parse_config
from minicache_trt.config import ModelConfig


@dataclass(frozen=True)
class Preset:
    """A model by a short name.

    Parameters
    ----------
    name : str
    hub_id : str
        Repository on the Hugging Face Hub.
    raw_config : mapping
        The keys of that repository's config.json which ``parse_config`` reads.
    """

    name: str
    hub_id: str
    raw_config: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        return parse_config(self.raw_config, path=f"preset {self.name}")


_LLAMA2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
_LLAMA2_13B = _LLAMA2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
_LLAMA3_8B = _LLAMA2_7B | {
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_LLAMA3_CHAT = {"eos_token_id": 128009}
_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA31_8B = _LLAMA3_8B | {"max_position_embeddings": 131072, "rope_scaling": _LLAMA3_ROPE}
_LLAMA31_CHAT = {"eos_token_id": [128001, 128008, 128009]}
_LLAMA32_1B = _LLAMA31_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0},
    "tie_word_embeddings": True,
}
_LLAMA32_3B = _LLAMA32_1B | {"head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28}
_TINYLLAMA = _LLAMA2_7B | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "torch_dtype": "bfloat16",
}
_SMOLLM2_135M = _LLAMA2_7B | {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}
_MISTRAL_7B = _LLAMA2_7B | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
}
_MISTRAL_7B_V2 = _MISTRAL_7B | {"rope_theta": 1000000.0, "sliding_window": None}
_MISTRAL_7B_V3 = _MISTRAL_7B_V2 | {"vocab_size": 32768}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("llama2-7b", "meta-llama/Llama-2-7b-hf", _LLAMA2_7B),
        Preset("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", _LLAMA2_7B),
        Preset("llama2-13b", "meta-llama/Llama-2-13b-hf", _LLAMA2_13B),
        Preset("llama2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", _LLAMA2_13B),
        Preset("llama2-70b", "meta-llama/Llama-2-70b-hf", _LLAMA2_7B | _70B),
        Preset("llama2-70b-chat", "meta-llama/Llama-2-70b-chat-hf", _LLAMA2_7B | _70B),
        Preset("llama3-8b", "meta-llama/Meta-Llama-3-8B", _LLAMA3_8B),
        Preset("llama3-8b-instruct", "meta-llama/Meta-Llama-3-8B-Instruct", _LLAMA3_8B | _LLAMA3_CHAT),
        Preset("llama3-70b", "meta-llama/Meta-Llama-3-70B", _LLAMA3_8B | _70B),
        Preset("llama3-70b-instruct", "meta-llama/Meta-Llama-3-70B-Instruct", _LLAMA3_8B | _70B | _LLAMA3_CHAT),
        Preset("llama3.1-8b", "meta-llama/Llama-3.1-8B", _LLAMA31_8B),
        Preset("llama3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", _LLAMA31_8B | _LLAMA31_CHAT),
        Preset("llama3.1-70b", "meta-llama/Llama-3.1-70B", _LLAMA31_8B | _70B),
        Preset("llama3.1-70b-instruct", "meta-llama/Llama-3.1-70B-Instruct", _LLAMA31_8B | _70B | _LLAMA31_CHAT),
        Preset("llama3.2-1b", "meta-llama/Llama-3.2-1B", _LLAMA32_1B),
        Preset("llama3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", _LLAMA32_1B | _LLAMA31_CHAT),
        Preset("llama3.2-3b", "meta-llama/Llama-3.2-3B", _LLAMA32_3B),
        Preset("llama3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", _LLAMA32_3B | _LLAMA31_CHAT),
        Preset("llama3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct", _LLAMA31_8B | _70B | _LLAMA31_CHAT),
        Preset("mistral-7b", "mistralai/Mistral-7B-v0.1", _MISTRAL_7B),
        Preset("mistral-7b-v0.3", "mistralai/Mistral-7B-v0.3", _MISTRAL_7B_V3),
        Preset("mistral-7b-instruct-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", _MISTRAL_7B),
        Preset("mistral-7b-instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2", _MISTRAL_7B_V2),
        Preset("mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", _MISTRAL_7B_V3),
        Preset("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", _SMOLLM2_135M),
        Preset(
            "smollm2-135m-instruct",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            _SMOLLM2_135M | {"bos_token_id": 1, "eos_token_id": 2},
        ),
        Preset("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", _TINYLLAMA),
    )
}


def list_presets() -> list[Preset]:
    """All presets, by name."""
    return [PRESETS[name] for name in sorted(PRESETS)]
