"""Whether an engine computes what Hugging Face's model of another checkpoint does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from minicache_trt.build import load_engine
from minicache_trt.hf_config import load_config
from minicache_trt.runtime.llm import LLM

LENGTH = 150


def hugging_face_model(checkpoint: Path) -> Any:
    """transformers' model of a checkpoint, float32."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, config=load_config(checkpoint), dtype=torch.float32)


def logits(model: Any) -> NDArray[np.float32]:
    """Of `tokens`, by transformers."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([tokens(model.config.vocab_size)]), use_cache=False).logits[0])


def tokens(vocabulary: int) -> list[int]:
    return np.random.default_rng(3).integers(0, vocabulary, LENGTH).tolist()


def engine_logits(engine: Path, backend: str = "onnxruntime") -> NDArray[np.float32]:
    """Of `tokens`, by an engine: a prompt, then forced decoding."""
    llm = LLM.from_engine(load_engine(engine, 1, backend))
    (scores,) = llm.score([tokens(llm.engine.model.vocab_size)], [LENGTH - 70])
    return scores


def assert_same_logits(engine: Path, model: Any, limit: float = 1e-3, backend: str = "onnxruntime") -> None:
    """Largest difference of logits between an engine and transformers' model."""
    mine, theirs = engine_logits(engine, backend), logits(model)
    assert theirs.std() > 0.1
    assert np.abs(mine - theirs).max() <= limit
