"""Configurations of Hugging Face's models, the same with transformers 4 and 5.

transformers 5 keeps RoPE in ``rope_parameters``; transformers 4 in ``rope_theta``, ``rope_scaling`` and others, and it
silently takes defaults for a checkpoint that transformers 5 wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

OLD_ROPE = int(transformers.__version__.split(".")[0]) < 5
"""Whether RoPE is kept as in transformers 4."""


def load_config(path: str | Path) -> Any:
    """A checkpoint's configuration, with RoPE and attention as its model is meant to compute them."""
    config = transformers.AutoConfig.from_pretrained(path)
    part = config.get_text_config()
    if OLD_ROPE and hasattr(part, "rope_parameters"):
        for name, value in old_rope(part.rope_parameters).items():
            setattr(part, name, value)
    if has_softcaps(config):
        # PyTorch's own attention knows none: transformers 4 would leave them out.
        config._attn_implementation = part._attn_implementation = "eager"
    return config


def has_softcaps(config: Any) -> bool:
    """Whether attention's logits are capped."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def old_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of transformers 4 for ``rope_parameters`` of transformers 5."""
    if "full_attention" in rope:
        local = rope["sliding_attention"]["rope_theta"]
        return {**old_rope(rope["full_attention"]), "rope_local_base_freq": local}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if scaling["rope_type"] == "longrope":
        # Phi-3 takes no other; a factor of attention is read, but not from a file.
        names = ("short_factor", "long_factor", "attention_factor")
        scaling = {"type": "longrope", **{name: scaling[name] for name in names if name in scaling}}
    fields = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
    }
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return fields


def set_longrope_divisors(config: Any, divisors: Sequence[float]) -> None:
    """Let LongRoPE divide frequencies by ``divisors`` at every length."""
    rope = config.rope_scaling if OLD_ROPE else config.rope_parameters
    rope["short_factor"] = rope["long_factor"] = list(divisors)
