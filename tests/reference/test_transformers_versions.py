"""Configurations of checkpoints as transformers 5 writes them, whichever transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minicache_trt.hf_config import has_softcaps, load_config, old_rope
from tests.support.checkpoints import LAYERED, SHAPES, make_checkpoint
from tests.support.rope import read_config

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
OLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rope_type": "default", "rope_theta": 5.0}, {"rope_theta": 5.0, "rope_scaling": None}),
    (
        {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0},
        {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 5.0, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
    (
        {**LONGROPE, "original_max_position_embeddings": 64},
        {
            "rope_theta": 1e4,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]},
        },
    ),
    (
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
        },
        {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_local_base_freq": 7.0},
    ),
]


@pytest.mark.parametrize(("rope", "fields"), OLD)
def test_fields_of_transformers_4(rope: dict[str, Any], fields: dict[str, Any]) -> None:
    assert old_rope(rope) == fields


@pytest.mark.parametrize("shape", ["llama3 rope", "linear rope", "phi3, GQA 4:2, partial rotary, float16"])
def test_rope_that_transformers_5_wrote(tmp_path: Path, shape: str) -> None:
    """A model of the file with ``rope_parameters`` alone rotates as the one that was saved."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", **SHAPES[shape])
    config = read_config(checkpoint)
    for name in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
        config.pop(name, None)
    saved = AutoModelForCausalLM.from_pretrained(checkpoint).model.rotary_emb.inv_freq
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=load_config(checkpoint))
    assert torch.equal(model.model.rotary_emb.inv_freq, saved)


@pytest.mark.parametrize(("shape", "capped"), [("gemma2", True), ("gemma3", False)])
def test_soft_caps_are_computed(tmp_path: Path, shape: str, capped: bool) -> None:
    config = load_config(make_checkpoint(tmp_path / "checkpoint", **LAYERED[shape]))
    assert has_softcaps(config) == capped
    assert (config._attn_implementation == "eager") == capped
