"""Small checkpoints with random weights, as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}


@pytest.fixture
def save_model(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """``save_model(family, shard_size=..., dtype=..., **config)`` returns the directory and the model."""

    def save(family: str = "llama", *, shard_size: str = "1GB", dtype: str = "float32", **config: Any):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        options = {**SHAPE, "pad_token_id": 0, **config}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).to(getattr(torch, dtype))
        directory = tmp_path / f"{family}-checkpoint"
        model.save_pretrained(directory, max_shard_size=shard_size)
        return directory, model

    return save


@pytest.fixture
def raw_config() -> dict[str, Any]:
    """A valid config.json."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16", **SHAPE}


@pytest.fixture
def write_config(tmp_path: Path, raw_config: dict[str, Any]) -> Callable[..., Path]:
    """``write_config(**changes)`` returns a directory with a config.json and no weights; None removes a key."""

    def write(**changes: Any) -> Path:
        directory = tmp_path / "config-only"
        directory.mkdir(exist_ok=True)
        raw = {key: value for key, value in {**raw_config, **changes}.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(raw))
        return directory

    return write
