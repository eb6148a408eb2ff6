"""Small random checkpoints in Hugging Face format.

Weights are drawn wider than Hugging Face's initialisation, so that attention is peaked and a wrong key, value or mask
shows in the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

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
}


def make_checkpoint(directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint whose config is `DEFAULTS` with ``overrides`` (``family`` and ``dtype`` included)."""
    values = DEFAULTS | overrides
    family, dtype = values.pop("family", "llama"), values.pop("dtype", "float32")
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**values))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    return directory
