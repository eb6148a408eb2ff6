"""The decoder, written once: eager in PyTorch, or a graph, depending on the `Ops` given."""

from __future__ import annotations

from typing import TypeVar

from minicache_trt.config import ModelConfig
from minicache_trt.model.ops import Ops

T = TypeVar("T")


def decoder(config: ModelConfig, ops: Ops[T], input_ids: T, positions: T, logit_index: T) -> T:
    """Logits ``[N, vocab]`` of the packed rows ``logit_index``; inputs as in `minicache_trt.contract`."""
    x = ops.embed(input_ids)
    if config.embedding_scale != 1.0:
        x = ops.scale(x, config.embedding_scale)
    ropes = [config.rope_at(layer) for layer in range(config.num_layers)]
    rotations = {rope: ops.rotation(positions, rope) for rope in dict.fromkeys(ropes)}
    for layer in range(config.num_layers):
        name, rotation = f"layers.{layer}", rotations[ropes[layer]]
        h = ops.rms_norm(x, f"{name}.input_norm")
        q, k, v = (ops.linear(h, f"{name}.attention.{part}") for part in "qkv")
        if config.qk_norm:
            q = ops.head_norm(q, f"{name}.attention.q_norm", config.num_heads)
            k = ops.head_norm(k, f"{name}.attention.k_norm", config.num_kv_heads)
        q = ops.rotary(q, rotation, config.num_heads)
        k = ops.rotary(k, rotation, config.num_kv_heads)
        h = ops.linear(ops.paged_attention(q, k, v, layer), f"{name}.attention.o")
        if config.output_norms:
            h = ops.rms_norm(h, f"{name}.attention.output_norm")
        x = ops.add(x, h)
        h = ops.rms_norm(x, f"{name}.post_attention_norm")
        h = ops.moe(h, f"{name}.moe") if config.num_experts else gated_mlp(ops, h, f"{name}.mlp")
        if config.output_norms:
            h = ops.rms_norm(h, f"{name}.mlp.output_norm")
        x = ops.add(x, h)
    logits = ops.linear(ops.rms_norm(ops.take(x, logit_index), "norm"), "lm_head")
    return logits if config.logit_softcap is None else ops.softcap(logits, config.logit_softcap)


def gated_mlp(ops: Ops[T], x: T, name: str) -> T:
    """SwiGLU or GEGLU (arXiv 2002.05202)."""
    return ops.linear(ops.gated(ops.linear(x, f"{name}.gate"), ops.linear(x, f"{name}.up")), f"{name}.down")
