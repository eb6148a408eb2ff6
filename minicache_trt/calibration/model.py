"""A checkpoint's decoder, layer by layer, with attention given by the caller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from minicache_trt.config import ModelConfig
from minicache_trt.hf_config import OLD_ROPE
from minicache_trt.hf_reference import load_checkpoint_model

ATTENTION = "minicache_trt_calibrate"
"""Name under which the attention below is registered with transformers."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""From layer, queries ``[S, num_heads, T, D]`` (scaled), keys after RoPE and values ``[S, num_kv_heads, T, D]`` to
outputs ``[S, num_heads, T, D]``."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, attend: Attend,
    **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The signature of transformers' attention functions around an `Attend`; ``mask`` is None."""
    return attend(module.layer_idx, query * scaling, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


class CalibrationModel:
    """Hugging Face's modules of a checkpoint in float32, run one layer after another.

    Parameters
    ----------
    directory : Path
        The checkpoint.
    config : ModelConfig
        For the context it is calibrated for (`ModelConfig.for_context`).
    """

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self.config = config
        model: Any = load_checkpoint_model(directory, config)
        model.set_attn_implementation(ATTENTION)
        self._model = model.eval().requires_grad_(False)
        self.output_weight: Tensor = model.lm_head.weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states ``[S, T, hidden]`` of token ids ``[S, T]`` before the first layer."""
        embedding = self._model.model.embed_tokens
        result: Tensor = embedding(tokens)
        # Embeddings of Gemma scale themselves, but those of Gemma 2 in transformers 4.
        return result if hasattr(embedding, "embed_scale") else result * self.config.embedding_scale

    def layer(self, index: int, hidden: Tensor, first: int, attend: Attend) -> Tensor:
        """Hidden states after a layer, for tokens at positions ``first`` and on."""
        positions = torch.arange(first, first + hidden.shape[1])[None]
        result = self._model.model.layers[index](
            hidden,
            attention_mask=None,
            position_ids=positions,
            use_cache=False,
            attend=attend,
            **self._rotary(index, hidden, positions),
        )
        states: Tensor = result[0] if isinstance(result, tuple) else result  # Gemma's layers of transformers 4
        return states

    def _rotary(self, index: int, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        """Cosines and sines for a layer, by the arguments it takes."""
        model = self._model.model
        if self.config.local_rope is None:
            return {"position_embeddings": model.rotary_emb(hidden, positions)}
        if OLD_ROPE:  # a layer chooses
            return {
                "position_embeddings_global": model.rotary_emb(hidden, positions),
                "position_embeddings_local": model.rotary_emb_local(hidden, positions),
            }
        return {"position_embeddings": model.rotary_emb(hidden, positions, self._model.config.layer_types[index])}

    def final(self, hidden: Tensor) -> Tensor:
        """Hidden states after the last norm."""
        result: Tensor = self._model.model.norm(hidden)
        return result

    def logits(self, rows: Tensor) -> Tensor:
        """``[n, vocab]`` of hidden states ``[n, hidden]`` after the last norm."""
        logits, cap = rows @ self.output_weight.T, self.config.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap
