"""The weights a model needs, and where in a checkpoint's tensors they are."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
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
            if config.output_norms:
                layer["attention.output_norm.weight"] = (hidden,)
            layer["post_attention_norm.weight"] = (hidden,)
        if name == "attention.o" and config.qk_norm:
            layer |= {f"attention.{part}_norm.weight": (config.head_dim,) for part in "qk"}
        layer[f"{name}.weight"] = (rows, columns)
        if has_bias:
            layer[f"{name}.bias"] = (rows,)
    if config.output_norms:
        layer["mlp.output_norm.weight"] = (hidden,)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer.items()})
    shapes["norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def linear_weights(config: ModelConfig) -> dict[str, str]:
    """Linear layers that weight-only formats quantize, the output layer included, to the names of their weights.

    Routers are not among them: they are small, and a rounded one sends tokens to other experts.
    """
    names = (name for name, shape in weight_shapes(config).items() if len(shape) == 2)
    linears = {
        name.removesuffix(".weight"): name
        for name in names
        if name != "embed.weight" and not name.endswith(".router.weight")
    }
    return linears | ({"lm_head": "embed.weight"} if config.tie_word_embeddings else {})


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


def bind_weights(
    config: ModelConfig, views: Mapping[str, WeightView], directory: Path, elsewhere: Collection[str] = ()
) -> dict[str, WeightView]:
    """Weights under their canonical names, checked against the config. Tensors the model has no use for are left out.

    Weights that are stacked in one tensor become views of its rows. ``elsewhere``: linear layers whose weights are not
    among these tensors, because they are quantized.

    Raises
    ------
    UserError
        A weight is missing, or has another shape or an unsupported dtype.
    """
    shapes = weight_shapes(config)
    absent = {f"{linear}.weight" for linear in elsewhere}
    tensors = {name: parts for name, parts in stored_tensors(config).items() if not absent.issuperset(parts)}
    require_weights(tensors, views, directory)
    bound: dict[str, WeightView] = {}
    wrong: list[str] = []
    for name, parts in tensors.items():
        view, expected = views[name], stored_shape(shapes, parts)
        if view.shape != expected:
            wrong.append(
                f"{view.file}: {view.name}: expected shape {list(expected)} from config.json, got {list(view.shape)}"
            )
        elif view.dtype not in ITEM_SIZES:
            wrong.append(f"{view.file}: {view.name}: expected dtype {', '.join(ITEM_SIZES)}, got {view.dtype}")
        first = 0
        for part in parts if not wrong else ():
            bound[part] = view.rows(first, shapes[part][0])
            first += shapes[part][0]
    if wrong:
        raise UserError(
            _several(wrong, "; "),
            "use the checkpoint's unquantized version"
            if "expected dtype" in wrong[0]
            else "check that config.json belongs to these weights",
        )
    return {canonical: bound[canonical] for canonical in shapes if canonical not in absent}


def require_weights(needed: Collection[str], found: Collection[str], where: Path) -> None:
    """Refuse a checkpoint that lacks weights, naming them and what it has in their place.

    Raises
    ------
    UserError
        A name of ``needed`` is not in ``found``.
    """
    missing = [name for name in needed if name not in found]
    if not missing:
        return
    layer = re.compile(r"\d+")
    known = {layer.sub("*", name) for name in needed}
    # A tensor of a kind the model does not have is what a missing one may have been renamed to.
    unknown = list({layer.sub("*", name): name for name in found if layer.sub("*", name) not in known}.values())
    raise UserError(
        f"{where}: {len(missing)} of {len(needed)} weights are missing: {_several(missing, ', ')}"
        + (f"; unknown ones instead: {_several(unknown, ', ')}" if unknown else ""),
        "check that config.json belongs to these weights and that the download is complete",
    )


def _several(items: Sequence[str], separator: str) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return separator.join(items[:3]) + more
