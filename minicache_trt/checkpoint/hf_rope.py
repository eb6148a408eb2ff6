"""RoPE as config.json describes it, in the spelling of transformers 4 and of transformers 5."""

from __future__ import annotations

import math

from minicache_trt.checkpoint.json_fields import JsonFields
from minicache_trt.config import RopeConfig
from minicache_trt.errors import UserError

_TYPES = {
    "default": "none",
    "none": "none",
    "linear": "linear",
    "llama3": "llama3",
    "longrope": "longrope",
    "su": "longrope",
}
"""``su`` is what early Phi-3 checkpoints call LongRoPE."""
_LISTED = ("default", "linear", "llama3", "longrope")


def parse_rope(fields: JsonFields, partial: bool, layers: str) -> RopeConfig:
    """RoPE from ``rope_parameters`` (transformers 5) or from ``rope_theta`` and ``rope_scaling`` (before).

    Parameters
    ----------
    fields : JsonFields
        All of config.json.
    partial : bool
        Whether models of this family may rotate a part of each head.
    layers : str
        A kind of layers in ``layer_types``, where they differ. Before transformers 5, ``sliding_attention`` has the
        base ``rope_local_base_freq`` and no scaling, where a family has that.
    """
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    scaling = fields.get(key, dict, optional=True) or {}
    local = "rope_local_base_freq" in fields.values and layers == "sliding_attention"
    if any(isinstance(value, dict) for value in scaling.values()) and "rope_local_base_freq" in fields.values:
        scaling = JsonFields(scaling, f"{fields.path}: {key}").get(layers, dict, optional=True) or {}
    elif local:
        scaling = {}
    top = {
        "rope_theta": fields.values.get("rope_local_base_freq" if local else "rope_theta"),
        "partial_rotary_factor": fields.values.get("partial_rotary_factor"),
    }
    given = {name: value for name, value in (top | scaling).items() if value is not None}
    rope = JsonFields({"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **given}, f"{fields.path}: {key}")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UserError(f"{rope.path}: RoPE that differs between layers is not supported", "use another checkpoint")
    kind = scaling.get("rope_type", scaling.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UserError(f"{rope.path}: RoPE type {kind!r} is not supported", f"supported types: {', '.join(_LISTED)}")
    theta = rope.get("rope_theta", float)
    if theta <= 0:
        raise rope.error("rope_theta", "a positive number", theta)
    fraction = _fraction(rope, partial)
    scaling_type = _TYPES[kind]
    if scaling_type == "none":
        return RopeConfig(theta=theta, rotary_fraction=fraction)
    if scaling_type == "longrope":
        return _longrope(fields, rope, theta, fraction)
    factor = _positive(rope, "factor")
    if scaling_type == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor, rotary_fraction=fraction)
    return RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=factor,
        low_freq_factor=rope.get("low_freq_factor", float),
        high_freq_factor=rope.get("high_freq_factor", float),
        original_max_position=_original_length(fields, rope),
        rotary_fraction=fraction,
    )


def _longrope(fields: JsonFields, rope: JsonFields, theta: float, fraction: float) -> RopeConfig:
    original = _original_length(fields, rope)
    if rope.values.get("factor") is None:
        factor = fields.get("max_position_embeddings", int) / original
    else:
        factor = _positive(rope, "factor")
    attention = rope.get("attention_factor", float, optional=True)
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta=theta,
        scaling="longrope",
        factor=factor,
        original_max_position=original,
        rotary_fraction=fraction,
        divisors=_divisors(rope, "short_factor"),
        long_divisors=_divisors(rope, "long_factor"),
        attention_factor=attention,
    )


def _divisors(rope: JsonFields, key: str) -> tuple[float, ...]:
    numbers = rope.get(key, list)
    if any(type(number) not in (int, float) or not 0 < number < math.inf for number in numbers):
        raise rope.error(key, "a list of positive numbers", numbers)
    return tuple(float(number) for number in numbers)


def _original_length(fields: JsonFields, rope: JsonFields) -> int:
    name = "original_max_position_embeddings"
    original = fields.get(name, int, optional=True) or rope.get(name, int, optional=True)
    result: int = original or fields.get("max_position_embeddings", int)
    if result < 2:
        raise rope.error(name, "a number of at least 2", result)
    return result


def _fraction(rope: JsonFields, partial: bool) -> float:
    fraction: float = rope.get("partial_rotary_factor", float)
    if not partial and fraction != 1.0:
        raise rope.error("partial_rotary_factor", "1.0", fraction, "use a checkpoint that rotates whole heads")
    if not 0 < fraction <= 1:
        raise rope.error("partial_rotary_factor", "a number in (0, 1]", fraction)
    return fraction


def _positive(rope: JsonFields, key: str) -> float:
    value: float = rope.get(key, float)
    if value <= 0:
        raise rope.error(key, "a positive number", value)
    return value
