"""RoPE in configurations of transformers 4 and 5, in the words of transformers 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from minicache_trt.hf_config import OLD_ROPE, old_rope


def own_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a configuration with ``rope_parameters`` as the installed transformers takes them."""
    result = dict(values)
    if OLD_ROPE and "rope_parameters" in result:
        result |= old_rope({"rope_theta": result.get("rope_theta"), **result.pop("rope_parameters")})
    return result


def rope_parameters(config: Any) -> dict[str, Any]:
    """``rope_parameters`` of a configuration."""
    if not OLD_ROPE:
        result: dict[str, Any] = config.rope_parameters
        return result
    result = {"rope_type": "default", "rope_theta": config.rope_theta, **(getattr(config, "rope_scaling", None) or {})}
    if "type" in result:
        result["rope_type"] = result.pop("type")
    if hasattr(config, "partial_rotary_factor"):
        result["partial_rotary_factor"] = config.partial_rotary_factor
    if hasattr(config, "rope_local_base_freq"):
        local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
        return {"full_attention": result, "sliding_attention": local}
    return result


def read_config(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's config.json as transformers 5 writes it."""
    written: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return written | {"rope_parameters": rope_parameters(AutoConfig.from_pretrained(checkpoint))}
