"""The weights a model needs, and where in a checkpoint's tensors they are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from minicache_trt.checkpoint.families import FAMILIES
from minicache_trt.checkpoint.names import collapsed, listed
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
    expected = {name: stored_shape(shapes, parts) for name, parts in tensors.items()}
    require_weights(expected, views, directory, {name: view.shape for name, view in views.items()} | expected)
    _check_tensors(expected, views)
    bound: dict[str, WeightView] = {}
    for name, parts in tensors.items():
        first = 0
        for part in parts:
            bound[part] = views[name].rows(first, shapes[part][0])
            first += shapes[part][0]
    return {canonical: bound[canonical] for canonical in shapes if canonical not in absent}


def _check_tensors(expected: Mapping[str, tuple[int, ...]], views: Mapping[str, WeightView]) -> None:
    """Raises `UserError` that names every tensor of another shape, or of a type that cannot be read."""
    wrong: dict[str, list[str]] = {}
    remedy = "check that config.json belongs to these weights"
    for name, shape in expected.items():
        view = views[name]
        if view.shape != shape:
            wrong.setdefault(f"expected shape {list(shape)} from config.json, got {list(view.shape)}", []).append(name)
        elif view.dtype not in ITEM_SIZES:
            wrong.setdefault(f"expected dtype {', '.join(ITEM_SIZES)}, got {view.dtype}", []).append(name)
            remedy = "use the checkpoint's unquantized version"
    if wrong:
        files = {views[name].file for names in wrong.values() for name in names}
        where = files.pop() if len(files) == 1 else next(iter(files)).parent
        found = "; ".join(f"{listed(names)}: {what}" for what, names in wrong.items())
        raise UserError(f"{where}: {found}", remedy)


def require_weights(
    needed: Collection[str],
    found: Collection[str],
    where: Path,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Refuse a checkpoint that lacks weights, naming them and what it has in their place.

    Parameters
    ----------
    needed, found : collection of str
    where : Path
    shapes : mapping, optional
        Of both; with them, what seems to have been renamed is told.

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
    unknown = [name for name in found if layer.sub("*", name) not in known]
    renamed = {} if shapes is None else _renamed(missing, unknown, shapes)
    pairs = [f"{old} to {new}" for old, new in zip(*map(collapsed, (renamed.values(), renamed)), strict=False)]
    raise UserError(
        f"{where}: {len(missing)} of {len(needed)} weights are missing: {listed(missing)}"
        + (f"; unknown ones instead: {listed(unknown)}" if unknown else ""),
        f"if they were renamed, undo it: {', '.join(pairs)}"
        if pairs
        else "check that config.json belongs to these weights and that the download is complete",
    )


def _renamed(
    missing: Collection[str], unknown: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Missing names to the unknown ones most like them, of the same shape and with the same numbers."""
    layer, left, result = re.compile(r"\d+"), list(unknown), dict[str, str]()
    for name in missing:
        numbers = layer.findall(name)[:1]
        alike = [x for x in left if shapes[x] == shapes[name] and layer.findall(x)[:1] == numbers]
        closest = difflib.get_close_matches(name, alike, n=1, cutoff=0.3)
        if closest:
            result[name] = closest[0]
            left.remove(closest[0])
    return result
