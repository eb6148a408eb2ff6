"""SmoothQuant applied to the cache: keys divided by a calibrated scale per channel before they are rounded.

A key's channel c is divided by ``s_c = sqrt(max|K_c| / max|Q_c|)``, which the query side undoes: a ``linear`` stream of
one layer with ``encode = diag(1 / s)`` and ``decode = diag(s)``. Keys are taken after RoPE, queries likewise and over
all query heads of the KV head's group.

Source: Xiao et al., *SmoothQuant*, arXiv 2211.10438, equation 4 with alpha = 0.5. The paper smooths the inputs of
linear layers against their weights; a cache has no weights, so queries take their place. A channel whose keys or
queries are all zero keeps the scale 1.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.compression.calibration_text import Progress, required_tokenizer, token_sequences
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MIN_TOKENS = 512
"""Fewest tokens that scales are computed from."""
SMALLEST_SCALE, LARGEST_SCALE = 1e-4, 1e4
"""Scales are kept within these, so that no channel vanishes from the others' range."""
ATTENTION = "minicache_trt_observe"
"""Name under which the observing attention is registered with transformers."""

Scales = NDArray[np.float32]


def unit_scales(config: ModelConfig) -> Scales:
    """``[num_layers, num_kv_heads, head_dim]`` ones: the plan's size without a calibration."""
    return np.ones((config.num_layers, config.num_kv_heads, config.head_dim), np.float32)


def with_scales(plan: CompressionPlan, scales: Scales) -> CompressionPlan:
    """The plan with matrices that divide its linear key streams by ``scales [num_layers, num_kv_heads, head_dim]``."""
    matrices: dict[str, NDArray[np.generic]] = {}
    for index, stream in enumerate(plan.streams):
        if stream.merge == "linear":
            own = scales[stream.layers[0]]
            unit = np.eye(own.shape[-1], dtype=np.float32)
            matrices[f"streams.{index}.encode"] = unit / own[:, None]
            matrices[f"streams.{index}.decode"] = unit * own[:, None]
            matrices[f"streams.{index}.mean"] = np.zeros_like(own)
    return replace(plan, matrices=matrices)


def key_scales(directory: Path, config: ModelConfig, text: Path, progress: Progress) -> Scales:
    """Scales of every layer's keys, from running a Hugging Face checkpoint over a text.

    Parameters
    ----------
    directory : Path
        The checkpoint, with its tokenizer.
    config : ModelConfig
    text : Path
        UTF-8 documents separated by a newline and a NUL, or plain text; only maxima are kept of it.
    progress : callable
        Takes bytes read and bytes in all.

    Returns
    -------
    ndarray
        ``[num_layers, num_kv_heads, head_dim]`` float32.

    Raises
    ------
    UserError
        The text cannot be read or is too short, or the checkpoint has no tokenizer that fits it.
    """
    tokenizer = required_tokenizer(directory, text)
    tokens, keys, queries = 0, np.zeros_like(unit_scales(config)), np.zeros_like(unit_scales(config))
    observe = _Observer(directory, config, keys, queries)
    for ids in token_sequences(text, tokenizer, config, progress):
        observe(ids)
        tokens += len(ids)
    if tokens < MIN_TOKENS:
        raise UserError(
            f"calibration text {text} is too short: {tokens} tokens, expected at least {MIN_TOKENS}",
            "give a longer text of the kind the model will read",
        )
    known = (keys > 0) & (queries > 0)
    scales = np.sqrt(np.where(known, keys, 1) / np.where(known, queries, 1))
    result: Scales = np.clip(scales, SMALLEST_SCALE, LARGEST_SCALE).astype(np.float32)
    return result


class _Observer:
    """A checkpoint's decoder layers, run for the largest magnitude of every channel of their keys and queries.

    ``keys`` and ``queries`` ``[num_layers, num_kv_heads, head_dim]`` are updated in place.
    """

    def __init__(self, directory: Path, config: ModelConfig, keys: Scales, queries: Scales) -> None:
        import torch
        from transformers import AttentionInterface, AutoModel
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from minicache_trt.hf_config import load_config
        from minicache_trt.reference.history import TieredHistory, tiered_attention

        uncompressed = CompressionPlan("full")

        def observe(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings: Any) -> Any:
            """``q [1, num_heads, T, head_dim]`` and ``k [1, num_kv_heads, T, head_dim]`` after RoPE."""
            layer = module.layer_idx
            largest = q[0].abs().amax(1).view(config.num_kv_heads, config.group_size, -1).amax(1)
            np.maximum(queries[layer], largest.numpy(), out=queries[layer])
            np.maximum(keys[layer], k[0].abs().amax(1).numpy(), out=keys[layer])
            if settings.get("softcap") is not None:  # which PyTorch's attention cannot do
                return tiered_attention(module, q, k, v, mask, history=TieredHistory(uncompressed, ()), **settings)
            return sdpa_attention_forward(module, q, k, v, mask, **settings)

        AttentionInterface.register(ATTENTION, observe)
        model: Any = AutoModel.from_pretrained(
            str(directory),
            config=load_config(directory),
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            local_files_only=True,
        )
        self._model = model.eval()

    def __call__(self, ids: list[int]) -> None:
        import torch

        with torch.inference_mode():
            # Without a mask the attention is causal, and one sequence has no padding.
            self._model(input_ids=torch.tensor([ids]), use_cache=False)
