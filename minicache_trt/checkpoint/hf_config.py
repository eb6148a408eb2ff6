"""From a checkpoint's config.json to ``ModelConfig``, in the spelling of transformers 4 and of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicache_trt.checkpoint.families import FAMILIES, Family
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

_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 1,
}
_DEFAULT_EOS = 2

_ROPE_TYPES = {"default": "none", "none": "none", "linear": "linear", "llama3": "llama3"}


@dataclass(frozen=True)
class _Fields:
    """Typed reading of a JSON object; ``path`` names the file in errors."""

    values: Mapping[str, Any]
    path: str

    def get(self, key: str, kind: type, *, optional: bool = False) -> Any:
        value = self.values.get(key)
        if value is None and optional:
            return None
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, kind.__name__, value)
        return value

    def error(self, key: str, expected: str, value: Any, remedy: str = "correct the file") -> UserError:
        got = "nothing" if key not in self.values else repr(value)
        return UserError(f"{self.path}: {key}: expected {expected}, got {got}", remedy)


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
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        raise UserError(f"{path}: missing {', '.join(missing)}", "restore the file from the original checkpoint")
    fields = _Fields({**_DEFAULTS, **family.defaults, **raw}, path)
    _check_supported(fields)
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
            rope=_parse_rope(fields),
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", bool, optional=True)),
            dtype=_parse_dtype(fields) or "float16",
            bos_token_id=fields.get("bos_token_id", int, optional=True),
            eos_token_ids=_parse_eos(fields, generation),
            **_family_fields(family, fields),
        )
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: {error}", "this shape is not supported; use another checkpoint") from error


def find_family(raw: Mapping[str, Any], path: str) -> Family:
    """The row of ``FAMILIES`` that covers config.json's ``architectures``, or where absent its ``model_type``."""
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    for family in FAMILIES.values():
        if isinstance(architectures, list) and architectures:
            if any(architecture in family.architectures for architecture in architectures):
                return family
        elif model_type == family.model_type:
            return family
    supported = "; ".join(
        f"{f.name} ({', '.join(f.architectures)}, model_type {f.model_type})" for f in FAMILIES.values()
    )
    raise UserError(
        f"{path}: architectures {architectures!r} with model_type {model_type!r} is not supported",
        f"supported families: {supported}",
    )


def _check_supported(fields: _Fields) -> None:
    if fields.values["hidden_act"] != "silu":
        raise fields.error("hidden_act", "'silu'", fields.values["hidden_act"], "use a checkpoint with this activation")
    quantization = fields.values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{fields.path}: quantization_config: quantized checkpoints ({method}) are not supported",
            "use the unquantized checkpoint; weights are quantized when the engine is built",
        )
    layer_types = fields.values.get("layer_types")
    if isinstance(layer_types, list) and len(set(map(str, layer_types))) > 1:
        raise fields.error("layer_types", "equal layers", sorted(set(map(str, layer_types))), "use another checkpoint")


def _family_fields(family: Family, fields: _Fields) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, key in family.fields.items():
        if name == "sliding_window":
            values[name] = fields.get(key, int, optional=True)
            if values[name] is not None and values[name] < 1:
                raise fields.error(key, "a positive number or null", values[name])
        else:
            values[name] = bool(fields.get(key, bool, optional=True))
    return values


def _parse_rope(fields: _Fields) -> RopeConfig:
    """RoPE from ``rope_parameters`` (transformers 5) or from ``rope_theta`` and ``rope_scaling`` (before)."""
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    scaling = fields.get(key, dict, optional=True) or {}
    top = {name: fields.values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    given = {name: value for name, value in (top | scaling).items() if value is not None}
    rope = _Fields({"rope_theta": 10000.0, **given}, f"{fields.path}: {key}")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UserError(f"{rope.path}: RoPE that differs between layers is not supported", "use another checkpoint")
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _ROPE_TYPES:
        supported = ", ".join(name for name in _ROPE_TYPES if name != "none")
        raise UserError(f"{rope.path}: RoPE type {kind!r} is not supported", f"supported types: {supported}")
    partial = rope.values.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise rope.error("partial_rotary_factor", "1.0", partial, "use a checkpoint that rotates whole heads")
    theta = rope.get("rope_theta", float)
    if theta <= 0:
        raise rope.error("rope_theta", "a positive number", theta)
    if _ROPE_TYPES[kind] == "none":
        return RopeConfig(theta=theta)
    factor = rope.get("factor", float)
    if factor <= 0:
        raise rope.error("factor", "a positive number", factor)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    original = fields.get("original_max_position_embeddings", int, optional=True)
    if original is None:
        original = rope.get("original_max_position_embeddings", int, optional=True)
    return RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=factor,
        low_freq_factor=rope.get("low_freq_factor", float),
        high_freq_factor=rope.get("high_freq_factor", float),
        original_max_position=original or fields.get("max_position_embeddings", int),
    )


def _parse_dtype(fields: _Fields) -> str | None:
    key = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    value = fields.get(key, str, optional=True)
    if value is None:
        return None
    name = value.removeprefix("torch.")
    if name not in ITEM_SIZES:
        raise fields.error(key, ", ".join(ITEM_SIZES), value, "use a checkpoint in one of these types")
    return name


def _parse_eos(fields: _Fields, generation: Mapping[str, Any] | None) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, then those of config.json, each once."""
    first = (generation or {}).get("eos_token_id")
    default = None if first is not None else _DEFAULT_EOS
    ids: dict[int, None] = {}
    for value in (first, fields.values.get("eos_token_id", default)):
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if type(token) is not int or token < 0:
                raise fields.error("eos_token_id", "an id, a list of ids or null", value)
            ids[token] = None
    return tuple(ids)
