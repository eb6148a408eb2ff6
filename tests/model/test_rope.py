"""Rotary frequencies against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minicache_trt.config import RopeConfig
from minicache_trt.model.rope import inverse_frequencies
from tests.support.rope import own_fields

CASES = {
    "none": (RopeConfig(theta=500000.0), {"rope_type": "default", "rope_theta": 500000.0}),
    "linear": (
        RopeConfig(scaling="linear", factor=4.0),
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "llama3": (
        RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


@pytest.mark.parametrize("scaling", CASES)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_frequencies_are_transformers_own(scaling: str, head_dim: int) -> None:
    rope, parameters = CASES[scaling]
    config = LlamaConfig(
        **own_fields({"rope_parameters": parameters}), head_dim=head_dim, max_position_embeddings=131072
    )
    assert torch.equal(inverse_frequencies(rope, head_dim), LlamaRotaryEmbedding(config).inv_freq)
