"""Small random checkpoints in Hugging Face format.

Weights are drawn wider than Hugging Face's initialisation, so that attention is peaked and a wrong key, value or mask
shows in the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.rope import own_fields

DEFAULTS: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 3072,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
}

SHAPES: dict[str, dict[str, Any]] = {
    "head_dim 80, GQA 6:2, 7 layers, biases": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "head_dim": 80,
        "num_hidden_layers": 7,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "head_dim 128, MHA, tied, bfloat16": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "9 layers, odd vocabulary, float16": {"num_hidden_layers": 9, "vocab_size": 203, "dtype": "float16"},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "mistral": {"family": "mistral", "sliding_window": None},
    "mistral, window 90": {"family": "mistral", "sliding_window": 90, "num_attention_heads": 6, "head_dim": 48},
    "mistral, window 250, MHA": {"family": "mistral", "sliding_window": 250, "num_key_value_heads": 4},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True, "head_dim": None, "hidden_size": 192, "vocab_size": 203},
    "qwen2, GQA 6:2, head_dim 48": {"family": "qwen2", "num_attention_heads": 6, "head_dim": 48},
    "qwen2, window 129": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 129,
        "max_window_layers": 0,
        "hidden_size": 128,
    },
    "qwen3": {"family": "qwen3", "num_attention_heads": 6, "head_dim": 80, "num_hidden_layers": 5},
    "qwen3, biases, tied": {"family": "qwen3", "attention_bias": True, "tie_word_embeddings": True},
    "phi3": {"family": "phi3", "head_dim": None, "num_key_value_heads": 4, "hidden_size": 192, "vocab_size": 131},
    "phi3, GQA 4:2, partial rotary, float16": {
        "family": "phi3",
        "head_dim": None,
        "hidden_size": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        "dtype": "float16",
    },
    "phi3, window 70": {"family": "phi3", "head_dim": None, "hidden_size": 256, "sliding_window": 70},
    "mixtral": {"family": "mixtral", "num_local_experts": 8, "head_dim": 48, "vocab_size": 131},
    "mixtral, 5 experts, 3 chosen, window, float16": {
        "family": "mixtral",
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "num_attention_heads": 6,
        "sliding_window": 100,
        "tie_word_embeddings": True,
        "dtype": "float16",
    },
    "phi3, LongRoPE": {
        "family": "phi3",
        "head_dim": None,
        "hidden_size": 128,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 20 for i in range(16)],
            "long_factor": [1.0 + i * i / 10 for i in range(16)],
        },
    },
}


GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 32, "sliding_window": 90, "pad_token_id": 0}
"""What all of Gemma's shapes below have, unless they say otherwise."""

LAYERED: dict[str, dict[str, Any]] = {
    "qwen2, window from layer 2": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 100,
        "max_window_layers": 2,
        "num_hidden_layers": 5,
    },
    "gemma2": {**GEMMA, "family": "gemma2", "tie_word_embeddings": True},
    "gemma2, scale 20, caps 5 and 3, GQA 6:2, bfloat16": {
        **GEMMA,
        "family": "gemma2",
        "num_attention_heads": 6,
        "hidden_size": 96,
        "head_dim": 48,
        "num_hidden_layers": 5,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "dtype": "bfloat16",
    },
    "gemma2, head_dim 256, windows in layers 1 and 2": {
        **GEMMA,
        "family": "gemma2",
        "head_dim": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 150,
    },
    "gemma3": {**GEMMA, "family": "gemma3_text", "num_hidden_layers": 8, "tie_word_embeddings": True},
    "gemma3, capped, scaled rope, GQA 6:2, float16": {
        **GEMMA,
        "family": "gemma3_text",
        "num_attention_heads": 6,
        "hidden_size": 96,
        "vocab_size": 203,
        "query_pre_attn_scalar": 28,
        "sliding_window": 129,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "attn_logit_softcapping": 8.0,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0},
        },
        "dtype": "float16",
    },
    "gemma3, windows in layers 1 and 2": {
        **GEMMA,
        "family": "gemma3_text",
        "head_dim": 64,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "gemma3, all layers with a window": {
        **GEMMA,
        "family": "gemma3_text",
        "num_key_value_heads": 4,
        "layer_types": ["sliding_attention"] * 4,
        "sliding_window": 200,
    },
}
"""Shapes whose layers differ in their windows, some of them in their RoPE."""


def make_checkpoint(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint whose config is `DEFAULTS` with ``overrides`` (``family`` and ``dtype`` included)."""
    values = DEFAULTS | overrides
    family, dtype = values.pop("family", "llama"), values.pop("dtype", "float32")
    values = {key: value for key, value in values.items() if key != "head_dim" or value is not None}
    if family == "phi3":
        values.setdefault("pad_token_id", 0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **own_fields(values)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.endswith("norm.weight") and family.startswith("gemma"):
            torch.nn.init.uniform_(parameter, -0.5, 1.0)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory
