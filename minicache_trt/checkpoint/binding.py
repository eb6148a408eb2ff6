"""The weights a model needs, and where in a checkpoint's tensors they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from minicache_trt.checkpoint.families import FAMILIES
from minicache_trt.checkpoint.weights import ITEM_SIZES, WeightView
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical names of all weights of a model, in the order the decoder uses them, with their shapes.

    A linear weight is ``[out, in]``. Biases are present where the config says so, ``lm_head`` unless it is tied.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "attention.q": (query, hidden, config.qkv_bias),
        "attention.k": (kv, hidden, config.qkv_bias),
        "attention.v": (kv, hidden, config.qkv_bias),
        "attention.o": (hidden, query, config.output_bias),
    }
    if config.num_experts:
        linears["moe.router"] = config.num_experts, hidden, False
    for mlp in [f"moe.experts.{expert}" for expert in range(config.num_experts)] or ["mlp"]:
        linears[f"{mlp}.gate"] = linears[f"{mlp}.up"] = intermediate, hidden, config.mlp_bias
        linears[f"{mlp}.down"] = hidden, intermediate, config.mlp_bias
    layer: dict[str, tuple[int, ...]] = {"input_norm.weight": (hidden,)}
    for name, (rows, columns, has_bias) in linears.items():
        if name in ("mlp.gate", "moe.router"):
            layer["post_attention_norm.weight"] = (hidden,)
        if name == "attention.o" and config.qk_norm:
            layer |= {f"attention.{part}_norm.weight": (config.head_dim,) for part in "qk"}
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def stored_tensors(config: ModelConfig) -> dict[str, list[str]]:
    """Names of a checkpoint's tensors, to the canonical names of the weights stacked in each, row under row."""
    family = FAMILIES[config.family]
    tensors: dict[str, list[str]] = {}
    for canonical in weight_shapes(config):
        tensors.setdefault(family.hf_name(canonical), []).append(canonical)
    return tensors


def stored_shape(shapes: Mapping[str, tuple[int, ...]], parts: list[str]) -> tuple[int, ...]:
    """Shape of the tensor in which these weights are stacked; ``shapes`` as `weight_shapes` returns them."""
    return sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:]


def bind_weights(config: ModelConfig, views: Mapping[str, WeightView], directory: Path) -> dict[str, WeightView]:
    """Weights under their canonical names, checked against the config. Tensors the model has no use for are left out.

    Weights that are stacked in one tensor become views of its rows.

    Raises
    ------
    UserError
        A weight is missing, or has another shape or an unsupported dtype.
    """
    shapes, tensors = weight_shapes(config), stored_tensors(config)
    missing = [name for name in tensors if name not in views]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{directory}: {len(missing)} of {len(tensors)} weights are missing: {', '.join(missing[:3])}{more}",
            "check that config.json belongs to these weights and that the download is complete",
        )
    bound: dict[str, WeightView] = {}
    for name, parts in tensors.items():
        view, expected = views[name], stored_shape(shapes, parts)
        if view.shape != expected:
            raise UserError(
                f"{view.file}: {view.name}: expected shape {list(expected)} from config.json, got {list(view.shape)}",
                "check that config.json belongs to these weights",
            )
        if view.dtype not in ITEM_SIZES:
            raise UserError(
                f"{view.file}: {view.name}: expected dtype {', '.join(ITEM_SIZES)}, got {view.dtype}",
                "use the checkpoint's unquantized version",
            )
        first = 0
        for part in parts:
            bound[part] = view.rows(first, shapes[part][0])
            first += shapes[part][0]
    return {canonical: bound[canonical] for canonical in shapes}
