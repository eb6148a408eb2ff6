"""Attention windows as config.json describes them, layer by layer."""

from __future__ import annotations

from minicache_trt.checkpoint.families import Family
from minicache_trt.checkpoint.json_fields import JsonFields

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers in config.json's ``layer_types``."""


def parse_windows(family: Family, fields: JsonFields) -> tuple[int | None, tuple[int, ...]]:
    """Tokens that queries of layers with a window see, or None where no layer has one, and the layers without.

    Raises
    ------
    UserError
        A value is wrong, or layers have something else than these two kinds of attention.
    """
    kinds = _layer_types(fields)
    key = family.fields.get("sliding_window")
    if key is None:
        if kinds is not None and SLIDING in kinds:
            raise fields.error("layer_types", f"{FULL} in every layer of a {family.name} model", SLIDING)
        return None, ()
    window: int | None = fields.get(key, int, optional=True)
    if "use_sliding_window" in family.defaults and not fields.get("use_sliding_window", bool):
        window = None
    if window is None:
        return None, ()
    if window < 1:
        raise fields.error(key, "a positive number or null", window)
    if kinds is None:
        kinds = _default_types(family, fields)
    full = tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)
    return (None, ()) if len(full) == len(kinds) and not _rope_differs(family) else (window, full)


def _rope_differs(family: Family) -> bool:
    """Which layers have a window decides about their RoPE, too."""
    return "rope_local_base_freq" in family.defaults


def _layer_types(fields: JsonFields) -> list[str] | None:
    given: list[str] | None = fields.get("layer_types", list, optional=True)
    layers = fields.get("num_hidden_layers", int)
    if given is None:
        return None
    other = sorted({str(kind) for kind in given} - {FULL, SLIDING})
    if other:
        raise fields.error("layer_types", f"{FULL} or {SLIDING}", ", ".join(other), "use another checkpoint")
    if len(given) != layers:
        raise fields.error("layer_types", f"{layers} of them, one per layer", given)
    return given


def _default_types(family: Family, fields: JsonFields) -> list[str]:
    """Kinds of layers that config.json does not list, as transformers takes them to be."""
    layers = fields.get("num_hidden_layers", int)
    if "use_sliding_window" in family.defaults:
        first = fields.get("max_window_layers", int)
        return [SLIDING if layer >= first else FULL for layer in range(layers)]
    if "sliding_window_pattern" in family.defaults:
        pattern = fields.get("sliding_window_pattern", int)
        if pattern < 1:
            raise fields.error("sliding_window_pattern", "a positive number", pattern)
        return [SLIDING if (layer + 1) % pattern else FULL for layer in range(layers)]
    return [SLIDING] * layers
