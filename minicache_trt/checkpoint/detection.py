"""Which family a config.json belongs to, and what is different about the ones that belong to none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicache_trt.checkpoint.families import FAMILIES, Family
from minicache_trt.checkpoint.hf_windows import FULL, SLIDING
from minicache_trt.errors import UserError

_DIFFERENCES = {
    "embedding_multiplier": "embeddings are scaled",
    "attention_multiplier": "attention logits have a scale of their own",
    "residual_multiplier": "residuals are scaled",
    "logit_scale": "output logits are scaled",
    "logits_scaling": "output logits are scaled",
    "use_parallel_residual": "attention and MLP read the same input",
    "layer_norm_epsilon": "norms subtract the mean",
    "layer_norm_eps": "norms subtract the mean",
    "norm_epsilon": "norms subtract the mean",
    "alibi": "positions are biases of the attention",
    "kv_lora_rank": "keys and values are latent (MLA)",
    "n_routed_experts": "experts are routed in another way",
    "num_experts": "experts are routed in another way",
    "moe_intermediate_size": "experts have a size of their own",
    "mamba_d_state": "layers are recurrent",
    "state_size": "layers are recurrent",
    "attention_hidden_size": "layers are recurrent",
    "ssm_cfg": "layers are recurrent",
    "clip_qkv": "queries, keys and values are clipped",
    "vision_config": "it also takes images",
    "encoder_layers": "it has an encoder",
    "is_encoder_decoder": "it has an encoder",
}
"""Keys of config.json that none of the supported families has, to what they mean."""
_COMMON = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "rms_norm_eps")
"""Keys that all of them have."""


def find_family(raw: Mapping[str, Any], path: str) -> Family:
    """The row of ``FAMILIES`` that covers config.json's ``architectures``, or where absent its ``model_type``.

    Raises
    ------
    UserError
        None does; it says which families there are and what in this config differs from them.
    """
    architectures, model_type = raw.get("architectures"), raw.get("model_type")
    for family in FAMILIES.values():
        if isinstance(architectures, list) and architectures:
            if any(each in (*family.architectures, family.text_part or None) for each in architectures):
                return family
        elif model_type == family.model_type:
            return family
    supported = "; ".join(
        f"{f.name} ({', '.join(f.architectures)}, model_type {f.model_type})" for f in FAMILIES.values()
    )
    found = differences(raw)
    absent = [key for key in _COMMON if raw.get(key) is None]
    if absent:
        found.append(f"it has no {', '.join(absent)}")
    raise UserError(
        f"{path}: architectures {architectures!r} with model_type {model_type!r} is not supported"
        + (f"; what differs: {'; '.join(found)}" if found else ""),
        f"supported families: {supported}",
    )


def differences(raw: Mapping[str, Any]) -> list[str]:
    """What a config.json has that no supported family has, as ``key value (meaning)``."""
    found = [
        f"{key} {raw[key]!r} ({meaning})"
        for key, meaning in _DIFFERENCES.items()
        if raw.get(key) not in (None, False, 0, 1) and not isinstance(raw[key], dict)
    ]
    found += [f"{key} ({meaning})" for key, meaning in _DIFFERENCES.items() if isinstance(raw.get(key), dict)]
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        if isinstance(raw.get(key), str) and raw[key] not in ("silu", "gelu_pytorch_tanh"):
            found.append(f"{key} {raw[key]!r} (the MLP is neither SwiGLU nor GEGLU)")
            break
    layers = raw.get("layer_types")
    other = {str(kind) for kind in layers} - {FULL, SLIDING} if isinstance(layers, list) else set()
    if other:
        found.append(f"layer_types {', '.join(sorted(other))} (layers of another kind)")
    return found
