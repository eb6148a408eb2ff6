"""Metadata of a GGUF file, read as Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicache_trt.checkpoint.families import FAMILIES
from minicache_trt.checkpoint.json_fields import JsonFields
from minicache_trt.errors import UserError

_ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3"}

_LLAMA3 = [
    {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]
"""RoPE of Llama 3.1 and of 3.2. The file holds what they do to the frequencies, not the parameters."""


@dataclass(frozen=True)
class Factors:
    """RoPE divisors that are tensors of the file, each by name or None: ``rope_freqs``, ``rope_factors_short``."""

    get: Callable[[str], NDArray[np.float32] | None]


def read_gguf_config(
    values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: Factors, path: str
) -> dict[str, Any]:
    """Hugging Face's config.json of the model in a GGUF file.

    Parameters
    ----------
    values : mapping
        The file's metadata.
    shapes : mapping
        Shapes of its tensors by name, rows first.
    factors : Factors
    path : str
        Names the file in errors.

    Raises
    ------
    UserError
        The architecture or its RoPE is not supported, or metadata is missing.
    """
    architecture = values.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture {architecture!r} is not supported",
            f"supported in GGUF files: {', '.join(_ARCHITECTURES)} (llama includes Mistral and Mixtral)",
        )
    prefix = f"{architecture}."
    fields = JsonFields({k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}, path)
    family = _ARCHITECTURES[architecture]
    experts = fields.get("expert_count", int, optional=True) or 0
    if experts and family in ("llama", "mistral"):
        family = "mixtral"
    heads, hidden = _uniform(fields, "attention.head_count"), fields.get("embedding_length", int)
    kv_heads = _uniform(fields, "attention.head_count_kv", heads)
    head_dim = fields.get("attention.key_length", int, optional=True) or hidden // heads
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path}: token_embd.weight is missing", "the file is no language model, or is incomplete")
    window = fields.get("attention.sliding_window", int, optional=True) or None
    config: dict[str, Any] = {
        "architectures": list(FAMILIES[family].architectures[:1]),
        "model_type": FAMILIES[family].model_type,
        "vocab_size": int(embedding[0]),
        "hidden_size": hidden,
        "intermediate_size": _uniform(fields, "feed_forward_length"),
        "num_hidden_layers": fields.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.get("attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": fields.get("context_length", int),
        "tie_word_embeddings": "output.weight" not in shapes,
        "sliding_window": window,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
    }
    config |= _family_fields(family, fields, shapes)
    if family == "llama" and window is not None:
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    if family in ("qwen2", "qwen3") and window is not None:
        config |= {"use_sliding_window": True, "max_window_layers": 0}
    if family == "phi3" and head_dim * heads == hidden:
        del config["head_dim"]
    return config | _rope(fields, factors, family, head_dim)


def _family_fields(family: str, fields: JsonFields, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Keys of config.json that only some families have."""
    if family == "llama":
        return {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
    if family == "mixtral":
        used = fields.get("expert_used_count", int)
        return {"num_local_experts": fields.get("expert_count", int), "num_experts_per_tok": used}
    if family == "phi3":
        return {"pad_token_id": 0}
    return {"attention_bias": False} if family == "qwen3" else {}


def _uniform(fields: JsonFields, key: str, default: int | None = None) -> int:
    """A number that some files give for each layer."""
    value = fields.values.get(key)
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise fields.error(key, "one positive number for all layers", value, "use another model")
    return value


def _rope(fields: JsonFields, factors: Factors, family: str, head_dim: int) -> dict[str, Any]:
    theta = fields.get("rope.freq_base", float, optional=True) or 10000.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    result: dict[str, Any] = {"rope_parameters": rope}
    kind = fields.values.get("rope.scaling.type") or "none"
    original = fields.get("rope.scaling.original_context_length", int, optional=True)
    short, long = factors.get("rope_factors_short.weight"), factors.get("rope_factors_long.weight")
    freqs = factors.get("rope_freqs.weight")
    rotated = fields.get("rope.dimension_count", int, optional=True) or head_dim
    if rotated != head_dim:
        if family != "phi3":
            raise fields.error("rope.dimension_count", str(head_dim), rotated, "use a model that rotates whole heads")
        rope["partial_rotary_factor"] = rotated / head_dim
    if short is not None and long is not None:
        if original is None:
            raise fields.error("rope.scaling.original_context_length", "a number", None, "convert the model again")
        rope |= {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
            "original_max_position_embeddings": original,
        }
        attention = fields.get("rope.scaling.attn_factor", float, optional=True)
        if attention is not None:
            rope["attention_factor"] = attention
        result["original_max_position_embeddings"] = original
    elif freqs is not None:
        rope |= {"rope_type": "llama3", **_llama3(freqs, theta, head_dim, fields.path)}
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": fields.get("rope.scaling.factor", float)}
    elif kind != "none":
        raise fields.error("rope.scaling.type", "none, linear or longrope", kind, "use another model")
    return result


def _llama3(freqs: NDArray[np.float32], theta: float, head_dim: int, path: str) -> dict[str, Any]:
    """Parameters with which the ``llama3`` rule divides the frequencies by what the file holds."""
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    for parameters in _LLAMA3:
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        turns = parameters["original_max_position_embeddings"] * plain / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        expected = 1 / ((1 - smooth) / parameters["factor"] + smooth)
        if freqs.shape == expected.shape and np.allclose(freqs, expected, rtol=1e-3):
            return parameters
    raise UserError(
        f"{path}: rope_freqs.weight holds divisors of the frequencies that are not those of Llama 3.1 or 3.2",
        "use the model's Hugging Face checkpoint",
    )
