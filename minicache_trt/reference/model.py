"""Reference model: a Hugging Face checkpoint whose attention reads a two-tier cache.

Everything but attention is the Hugging Face model itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from minicache_trt.compression.matrices import stream_matrices
from minicache_trt.compression.plan import CompressionPlan
from minicache_trt.config import ModelConfig
from minicache_trt.hf_config import load_config
from minicache_trt.reference.codec import EncodedBlocks
from minicache_trt.reference.constants import Constants
from minicache_trt.reference.history import ATTENTION_NAME, Adopt, TieredHistory, compressed_length


class Reference:
    """Hugging Face causal language model with the cache semantics of a compression plan.

    One sequence at a time, on the CPU. Quantizer and merges work in float32 whatever the model computes in.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        Checkpoint directory, or a model object, which keeps its own dtype and attention implementation.
    plan : CompressionPlan
        With its matrices. Without streams nothing is ever compressed.
    window : int
        Most recent tokens kept exact.
    quantum : int
        Prompt tokens that attend to one another exactly before they are demoted.
    dtype : torch.dtype
        Compute type of a checkpoint loaded from a directory.

    Attributes
    ----------
    stored : list of list of EncodedBlocks
        Of the latest `logits` or `greedy` call: ``stored[stream][block]``, each with N = 1.

    Raises
    ------
    UserError
        A plan that does not fit the model.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        plan: CompressionPlan,
        window: int = 64,
        quantum: int = 2048,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if window < 1 or quantum < 1:
            raise ValueError(f"window, quantum: expected positive numbers, got {window} and {quantum}")
        if isinstance(model, (str, Path)):
            model = AutoModelForCausalLM.from_pretrained(model, config=load_config(model), dtype=dtype)
        self.model: Any = model
        self.model.train(False)
        if plan.compresses:
            plan.validate(_model_shape(self.model.config))
        self.plan = plan
        self._constants = [
            Constants.of(
                stream,
                stream_matrices(plan.matrices, index),
                _rope_frequencies(self.model, stream.layers[0]) if stream.basis == "pre_rope" else None,
            )
            for index, stream in enumerate(plan.streams)
        ]
        self.window = window
        self.quantum = quantum
        self.stored: list[list[EncodedBlocks]] = [[] for _ in plan.streams]

    def logits(self, token_ids: Sequence[int], prompt_len: int, start: int = 0, adopt: Adopt | None = None) -> Tensor:
        """Teacher-forced logits: float32 ``[len(token_ids) - start, vocab]``.

        Parameters
        ----------
        token_ids : sequence of int
            Prompt and continuation.
        prompt_len : int
            Length of the prompt, 1 to ``len(token_ids)``; the tokens after it are taken as generated one by one.
        start : int
            First position whose logits are returned.
        adopt : callable, optional
            May replace the encoding of each compressed block, to side with an engine in rounding ties.
        """
        _check_length(token_ids, prompt_len, start)
        history = self._new_history(adopt)
        rows = []
        with self._attention():
            for begin, end, compressed in self._ranges(len(token_ids), prompt_len):
                history.compress(compressed)
                logits = self._forward(token_ids[begin:end], begin, max(1, end - max(begin, start)), history)
                if end > start:
                    rows.append(logits)
        return torch.cat(rows)

    def greedy(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedily generated token ids; stops after ``max_new_tokens``, not at end-of-sequence tokens."""
        prompt_len = len(prompt_ids)
        _check_length(prompt_ids, prompt_len, 0)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected a positive number, got {max_new_tokens}")
        history = self._new_history()
        with self._attention():
            for begin, end, compressed in self._ranges(prompt_len, prompt_len):
                history.compress(compressed)
                logits = self._forward(prompt_ids[begin:end], begin, 1, history)
            generated = [int(logits[0].argmax())]
            while len(generated) < max_new_tokens:
                position = prompt_len + len(generated) - 1
                history.compress(self._compressed_length(position, prompt_len))
                logits = self._forward(generated[-1:], position, 1, history)
                generated.append(int(logits[0].argmax()))
        return generated

    def uncompressed_logits(self, token_ids: Sequence[int], start: int = 0) -> Tensor:
        """Logits of the unchanged Hugging Face model: float32 ``[len(token_ids) - start, vocab]``."""
        _check_length(token_ids, len(token_ids), start)
        with torch.no_grad():
            output = self.model(torch.tensor([list(token_ids)]), use_cache=False, logits_to_keep=len(token_ids) - start)
        logits: Tensor = output.logits[0].to(torch.float32)
        return logits

    def _ranges(self, length: int, prompt_len: int) -> Iterator[tuple[int, int, int]]:
        """Ranges ``(begin, end, c)`` of positions with the same compressed length c; together ``[0, length)``."""
        for compressed, positions in groupby(range(length), lambda p: self._compressed_length(p, prompt_len)):
            members = list(positions)
            yield members[0], members[-1] + 1, compressed

    def _compressed_length(self, position: int, prompt_len: int) -> int:
        if not self.plan.compresses:
            return 0
        return compressed_length(position, prompt_len, self.window, self.quantum)

    def _new_history(self, adopt: Adopt | None = None) -> TieredHistory:
        history = TieredHistory(self.plan, self._constants, adopt)
        self.stored = history.stored
        return history

    def _forward(self, token_ids: Sequence[int], begin: int, keep: int, history: TieredHistory) -> Tensor:
        """Run tokens at positions ``begin`` and on; logits of the last ``keep`` of them."""
        positions = torch.arange(begin, begin + len(token_ids))[None]
        with torch.no_grad():
            output = self.model(
                torch.tensor([list(token_ids)]),
                position_ids=positions,
                use_cache=False,
                logits_to_keep=keep,
                history=history,
            )
        logits: Tensor = output.logits[0].to(torch.float32)
        return logits

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Attend through the tiered history within the block."""
        previous = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION_NAME)
        try:
            yield
        finally:
            self.model.set_attn_implementation(previous)


def _check_length(token_ids: Sequence[int], prompt_len: int, start: int) -> None:
    if not 1 <= prompt_len <= len(token_ids):
        raise ValueError(f"prompt_len: expected 1 to {len(token_ids)}, got {prompt_len}")
    if not 0 <= start < len(token_ids):
        raise ValueError(f"start: expected 0 to {len(token_ids) - 1}, got {start}")


def _model_shape(config: Any) -> ModelConfig:
    """The sizes a plan is validated against; everything else keeps its default."""
    return ModelConfig(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
    )


def _rope_frequencies(model: Any, layer: int) -> Tensor:
    """Radians per position of the rotary embedding of a layer, from the model's own, float32 ``[D / 2]``.

    A factor of cosines and sines (LongRoPE) stays in the keys: turning them back and forth commutes with it.

    Raises
    ------
    ValueError
        The model has no rotary embedding.
    """
    kinds = getattr(model.config, "layer_types", None)
    names = ["inv_freq", *([f"{kinds[layer]}_inv_freq"] if kinds else [])]
    # Gemma 3 of transformers 4 has a module of its own for layers with a window.
    local = getattr(model.model, "rotary_emb_local", None) if kinds and kinds[layer] == "sliding_attention" else None
    for module in (local or model).modules():
        for name in names:
            if hasattr(module, name):
                frequencies: Tensor = getattr(module, name).to(torch.float32)
                return frequencies
    raise ValueError(f"model: expected one with rotary embeddings for basis pre_rope, got {type(model).__name__}")
