"""From a checkpoint's config.json to ``ModelConfig``, in the spelling of transformers 4 and of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minicache_trt.checkpoint.detection import find_family
from minicache_trt.checkpoint.families import Family
from minicache_trt.checkpoint.hf_rope import parse_rope
from minicache_trt.checkpoint.hf_windows import parse_windows
from minicache_trt.checkpoint.json_fields import JsonFields
from minicache_trt.checkpoint.weights import ITEM_SIZES
from minicache_trt.config import ModelConfig, RopeConfig
from minicache_trt.errors import UserError

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)

_BESIDE_TEXT = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "quantization_config")
"""Keys of config.json that stand beside ``text_config`` and are of the whole model."""

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def parse_config(raw: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None, path: str) -> ModelConfig:
    """``ModelConfig`` from the object in config.json.

    Keys that are absent mean what transformers takes them to mean. An absent ``dtype`` becomes float16.

    Parameters
    ----------
    raw : mapping
        config.json.
    generation : mapping, optional
        generation_config.json: its end-of-sequence ids come before those of config.json.
    path : str
        Names the file in errors.

    Raises
    ------
    UserError
        The architecture, RoPE type, activation or quantization is not supported; a key is missing or has a wrong value.
    """
    family = find_family(raw, path)
    raw = text_part(family, raw, path)
    missing = [key for key in _REQUIRED if raw.get(key, family.defaults.get(key)) is None]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}", "restore the file from the original checkpoint")
    fields = JsonFields({**_DEFAULTS, **family.defaults, **raw}, path)
    _check_supported(family, fields)
    heads, hidden = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    head_dim = fields.get("head_dim", int, optional=True)
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise UserError(
                f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}", "set head_dim"
            )
        head_dim = hidden // heads
    kv_heads = fields.get("num_key_value_heads", int, optional=True)
    if fields.get("max_position_embeddings", int) < 1:
        raise fields.error("max_position_embeddings", "a positive number", raw["max_position_embeddings"])
    try:
        return ModelConfig(
            family=family.name,
            num_layers=fields.get("num_hidden_layers", int),
            hidden_size=hidden,
            intermediate_size=fields.get("intermediate_size", int),
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            vocab_size=fields.get("vocab_size", int),
            max_position_embeddings=fields.get("max_position_embeddings", int),
            rms_norm_eps=fields.get("rms_norm_eps", float),
            rope=parse_rope(fields, family.partial_rotary, "full_attention"),
            local_rope=_local_rope(family, fields),
            embedding_scale=math.sqrt(hidden) if family.scaled_embedding else 1.0,
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", bool, optional=True)),
            dtype=_parse_dtype(fields) or "float16",
            bos_token_id=fields.get("bos_token_id", int, optional=True),
            eos_token_ids=_parse_eos(fields, generation, raw),
            **_family_fields(family, fields),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}", "this shape is not supported; use another checkpoint") from error


def text_part(family: Family, raw: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """config.json of the language model alone, where the model also takes images."""
    architectures = raw.get("architectures")
    if not family.text_part or not isinstance(architectures, list) or family.text_part not in architectures:
        return raw
    text = JsonFields(raw, path).get("text_config", dict)
    beside = {key: raw[key] for key in _BESIDE_TEXT if raw.get(key) is not None}
    return {**{key: value for key, value in text.items() if value is not None}, **beside}


def _check_supported(family: Family, fields: JsonFields) -> None:
    key, activation = family.activation
    if fields.values[key] != activation:
        raise fields.error(key, repr(activation), fields.values[key], "use a checkpoint with this activation")
    if fields.values.get("use_bidirectional_attention"):
        raise fields.error(
            "use_bidirectional_attention", "false", True, "use a checkpoint that generates text, not embeddings"
        )
    quantization = fields.values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{fields.path}: quantization_config: quantized checkpoints ({method}) are not supported",
            "use the unquantized checkpoint (weights are quantized when the engine is built), or one in AWQ or GPTQ",
        )


def _family_fields(family: Family, fields: JsonFields) -> dict[str, Any]:
    values: dict[str, Any] = dict(family.constants)
    window, full_layers = parse_windows(family, fields)
    for name, key in family.fields.items():
        if name == "sliding_window":
            values |= {"sliding_window": window, "full_layers": full_layers}
        elif name in ("query_scalar", "attention_softcap", "logit_softcap"):
            values[name] = fields.get(key, float, optional=True)
        elif name in ("num_experts", "experts_per_token"):
            values[name] = fields.get(key, int)
        else:
            values[name] = bool(fields.get(key, bool, optional=True))
    return values


def _local_rope(family: Family, fields: JsonFields) -> RopeConfig | None:
    if "rope_local_base_freq" not in family.defaults:
        return None
    return parse_rope(fields, family.partial_rotary, "sliding_attention")


def _parse_dtype(fields: JsonFields) -> str | None:
    key = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    value = fields.get(key, str, optional=True)
    if value is None:
        return None
    name = value.removeprefix("torch.")
    if name not in ITEM_SIZES:
        raise fields.error(key, ", ".join(ITEM_SIZES), value, "use a checkpoint in one of these types")
    return name


def _parse_eos(fields: JsonFields, generation: Mapping[str, Any] | None, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, then those of config.json, each once."""
    first = (generation or {}).get("eos_token_id")
    second = raw.get("eos_token_id") if first is not None else fields.values["eos_token_id"]
    ids: dict[int, None] = {}
    for value in (first, second):
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or token < 0:
                raise fields.error("eos_token_id", "an id, a list of ids or null", value)
            ids[token] = None
    return tuple(ids)
