"""GGUF files of small Hugging Face checkpoints, with the names llama.cpp's converter gives things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.support.rope import own_fields, read_config

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "mixtral": "llama"}
QUANTIZED_BY_HAND = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types the package can only read: blocks of random codes with small scales."""


def write_gguf(
    source: Path, path: Path, kind: str = "F32", edit: Callable[[gguf.GGUFWriter], Any] | None = None
) -> Path:
    """Convert a one-file checkpoint; matrices are stored as ``kind``, vectors in 32 bits."""
    hf = read_config(source)
    family = hf["model_type"]
    architecture = ARCHITECTURES.get(family, family)
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, hf)
    for name, tensor in _tensors(source, hf).items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, quantized(tensor, Kind[kind]), raw_dtype=Kind[kind])
    if edit is not None:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(tensor: NDArray[np.float32], kind: Kind) -> NDArray[Any]:
    """Rows in a type of ggml."""
    if kind.name not in QUANTIZED_BY_HAND:
        return gguf.quants.quantize(tensor, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(tensor.size)
    blocks = rng.integers(0, 256, (*tensor.shape[:-1], tensor.shape[-1] // block, size), np.uint8)
    halves = blocks.view(np.float16) if kind.name in ("Q4_K", "Q5_K", "Q2_K") else blocks[..., -2:].view(np.float16)
    scale = np.float16(2e-4)
    if kind.name in ("Q4_K", "Q5_K"):
        halves[..., :2] = scale
    elif kind.name == "Q2_K":
        halves[..., -2:] = scale
    else:
        halves[...] = scale
    return blocks.reshape(*tensor.shape[:-1], -1)


def _write_metadata(writer: gguf.GGUFWriter, hf: dict[str, Any]) -> None:
    rope = hf["rope_parameters"]
    head = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if hf.get("sliding_window") and hf["model_type"] in ("mistral", "phi3"):
        writer.add_sliding_window(hf["sliding_window"])
    if hf["model_type"] == "mixtral":
        writer.add_expert_count(hf["num_local_experts"])
        writer.add_expert_used_count(hf["num_experts_per_tok"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(hf["original_max_position_embeddings"])


def _tensors(source: Path, hf: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    state = {name: w.float().numpy() for name, w in load_file(source / "model.safetensors").items()}
    heads, kv = hf["num_attention_heads"], hf["num_key_value_heads"]
    llama = hf["model_type"] in ARCHITECTURES
    result: dict[str, NDArray[np.float32]] = {}
    experts: dict[str, list[NDArray[np.float32]]] = {}
    for name, tensor in state.items():
        module, leaf = name.rsplit(".", 1)
        layer = ""
        if module.startswith("model.layers."):
            _, _, number, module = module.split(".", 3)
            layer = f"blk.{number}."
        if ".experts." in module:
            kind = {"w1": "gate", "w2": "down", "w3": "up"}[module.rsplit(".", 1)[1]]
            experts.setdefault(f"{layer}ffn_{kind}_exps.{leaf}", []).append(tensor)
            continue
        if llama and module in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _interleaved(tensor, heads if module.endswith("q_proj") else kv)
        result[f"{layer}{NAMES[module]}.{leaf}"] = tensor
    result |= {name: np.stack(parts) for name, parts in experts.items()}
    rope = hf["rope_parameters"]
    if rope["rope_type"] == "longrope":
        result["rope_factors_short.weight"] = np.array(rope["short_factor"], np.float32)
        result["rope_factors_long.weight"] = np.array(rope["long_factor"], np.float32)
    if rope["rope_type"] == "llama3":
        result["rope_freqs.weight"] = _llama3_divisors(rope, hf["head_dim"])
    return result


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows i and i + half of each head next to one another."""
    half = len(weight) // heads // 2
    rows = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in range(2)]
    return np.ascontiguousarray(weight[rows])


def _llama3_divisors(rope: dict[str, Any], head: int) -> NDArray[np.float32]:
    """Plain frequencies over those transformers computes."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = own_fields({"rope_parameters": rope})
    config = LlamaConfig(**fields, head_dim=head, max_position_embeddings=131072)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (rope["rope_theta"] ** -(np.arange(0, head, 2) / head) / frequencies.numpy()).astype(np.float32)
