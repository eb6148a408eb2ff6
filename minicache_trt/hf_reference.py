"""Hugging Face's model of an engine's checkpoint, with what the build changed: LongRoPE's divisors, rounded weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minicache_trt.checkpoint.binding import stored_tensors
from minicache_trt.checkpoint.families import FAMILIES
from minicache_trt.checkpoint.quantize import changed_weights
from minicache_trt.checkpoint.resolve import load_checkpoint
from minicache_trt.config import ModelConfig
from minicache_trt.engine_directory import CHECKPOINT, QUANTIZED, EngineInfo
from minicache_trt.hf_config import load_config, set_longrope_divisors
from minicache_trt.reference import Reference


def reference_for(directory: Path, info: EngineInfo) -> Reference:
    """Hugging Face's model with an engine's plan and its weights as the engine sees them."""
    changed: dict[str, NDArray[np.float32]] = {}
    if (directory / QUANTIZED).exists():
        checkpoint = load_checkpoint(str(directory / CHECKPOINT))
        changed = changed_weights(directory / QUANTIZED, checkpoint.weights)
    return Reference(load_model(directory, info, changed), info.plan, info.build.window, info.build.quantum)


def load_model(directory: Path, info: EngineInfo, changed: Mapping[str, NDArray[np.float32]]) -> Any:
    """Hugging Face's model of an engine's checkpoint, float32, at the engine's greatest length.

    LongRoPE has the divisors the engine was built with at every length. ``changed``: weights by canonical name that
    take the place of the checkpoint's.
    """
    return _load(directory / CHECKPOINT, info.model, changed)


def load_checkpoint_model(path: Path, shape: ModelConfig) -> Any:
    """Hugging Face's model of a checkpoint directory, float32, with the divisors of ``shape`` at every length."""
    return _load(path, shape, {})


def _load(path: Path, shape: ModelConfig, changed: Mapping[str, NDArray[np.float32]]) -> Any:
    models, config, alone = _model_class(path, shape)
    checkpoint = load_checkpoint(str(path))
    if checkpoint.int4 is not None and not changed:  # there are no other weights
        changed = changed_weights(checkpoint.int4, checkpoint.weights)
    if not changed and alone:
        return models.from_pretrained(path, config=config, dtype=torch.float32)
    views = checkpoint.weights
    weights = {name: view.torch().float() for name, view in views.items()}
    weights |= {name: torch.from_numpy(weight) for name, weight in changed.items()}
    head = weights.pop("lm_head.weight", None) if shape.tie_word_embeddings else None
    tensors = stored_tensors(shape)
    state = {name: torch.cat([weights[part] for part in parts]) for name, parts in tensors.items()}
    model = models.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    if head is not None:
        # The engine quantizes the output layer but not the embedding it shares its weight with.
        model.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return model


def _model_class(path: Path, shape: ModelConfig) -> tuple[Any, Any, bool]:
    """Class and configuration of a checkpoint's model; a LongRoPE model keeps the divisors of ``shape``.

    Of a model that also takes images they are those of its language model, and the last result is False.
    """
    import transformers

    config = load_config(path)
    if shape.rope.divisors:
        set_longrope_divisors(config, shape.rope.divisors)
    architecture = config.architectures[0]
    family = FAMILIES[shape.family]
    if architecture == family.text_part:
        return getattr(transformers, family.architectures[0]), config.text_config, False
    return getattr(transformers, architecture), config, True
