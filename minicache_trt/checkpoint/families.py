"""Model families as table rows: how each one's checkpoints spell what the decoder reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicache_trt.checkpoint.weights import ITEM_SIZES, WeightView
from minicache_trt.config import ModelConfig
from minicache_trt.errors import UserError

_LLAMA_MODULES = {
    "embed": "model.embed_tokens",
    "layers.{i}.input_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attention.q": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attention.k": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attention.v": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attention.o": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.post_attention_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}


@dataclass(frozen=True)
class Family:
    """One row of ``FAMILIES``.

    Parameters
    ----------
    name : str
        ``ModelConfig.family``.
    architectures : tuple of str
        Values of config.json's ``architectures`` that this row covers.
    model_type : str
        config.json's ``model_type``, which decides where ``architectures`` is absent.
    modules : mapping of str to str
        Canonical module to the checkpoint's module; ``{i}`` is the layer.
    fields : mapping of str to str
        ``ModelConfig`` fields that only some families have, to their config.json keys. A field that is not listed keeps
        ``ModelConfig``'s default whatever config.json says.
    defaults : mapping
        What an absent config.json key means, as in the family's transformers configuration.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    modules: Mapping[str, str]
    fields: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def hf_name(self, canonical: str) -> str:
        """The checkpoint's name of a canonical weight: ``layers.3.attention.q.weight`` to ``...q_proj.weight``."""
        module, _, leaf = canonical.rpartition(".")
        layer = ""
        if module.startswith("layers."):
            _, layer, rest = module.split(".", 2)
            module = f"layers.{{i}}.{rest}"
        return f"{self.modules[module].replace('{i}', layer)}.{leaf}"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architectures=("LlamaForCausalLM",),
            model_type="llama",
            modules=_LLAMA_MODULES,
            fields={"qkv_bias": "attention_bias", "output_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        ),
        Family(
            name="mistral",
            architectures=("MistralForCausalLM",),
            model_type="mistral",
            modules=_LLAMA_MODULES,
            fields={"sliding_window": "sliding_window"},
            defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        ),
    )
}


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
        "mlp.gate": (intermediate, hidden, config.mlp_bias),
        "mlp.up": (intermediate, hidden, config.mlp_bias),
        "mlp.down": (hidden, intermediate, config.mlp_bias),
    }
    layer: dict[str, tuple[int, ...]] = {"input_norm.weight": (hidden,)}
    for name, (rows, columns, has_bias) in linears.items():
        if name == "mlp.gate":
            layer["post_attention_norm.weight"] = (hidden,)
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


def bind_weights(config: ModelConfig, views: Mapping[str, WeightView], directory: Path) -> dict[str, WeightView]:
    """Weights under their canonical names, checked against the config. Tensors the model has no use for are left out.

    Raises
    ------
    UserError
        A weight is missing, or has another shape or an unsupported dtype.
    """
    family, shapes = FAMILIES[config.family], weight_shapes(config)
    names = {canonical: family.hf_name(canonical) for canonical in shapes}
    missing = [name for name in names.values() if name not in views]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{directory}: {len(missing)} of {len(names)} weights are missing: {', '.join(missing[:3])}{more}",
            "check that config.json belongs to these weights and that the download is complete",
        )
    bound = {canonical: views[name] for canonical, name in names.items()}
    for canonical, view in bound.items():
        if view.shape != shapes[canonical]:
            raise UserError(
                f"{view.file}: {view.name}: expected shape {list(shapes[canonical])} from config.json, "
                f"got {list(view.shape)}",
                "check that config.json belongs to these weights",
            )
        if view.dtype not in ITEM_SIZES:
            raise UserError(
                f"{view.file}: {view.name}: expected dtype {', '.join(ITEM_SIZES)}, got {view.dtype}",
                "use the checkpoint's unquantized version",
            )
    return bound
