"""``config.json`` of a TensorRT-LLM checkpoint (releases up to 1.2), read as Hugging Face's config.json.

Field names follow the format's public description and its ``PretrainedConfig``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicache_trt.checkpoint.families import FAMILIES
from minicache_trt.checkpoint.json_fields import JsonFields
from minicache_trt.errors import UserError

_FAMILIES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Phi3ForCausalLM": "phi3",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "residual_mlp": (False,),
    "fc_after_embed": (False,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_logn_attn": (False,),
    "embedding_multiplier": (1.0,),
    "attention_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "output_multiplier_scale": (1.0,),
    "is_pruned": (False,),
    "remove_duplicated_kv_heads": (False,),
}
"""Fields that change what the model computes, and the values with which they do not."""

_RENORMALIZE = 1
_LLAMA3_DEFAULTS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Ranks:
    """How weights are spread over ``rank<i>.safetensors``: tensor-parallel ranks within pipeline stages.

    ``moe_tp`` and ``moe_ep`` split the experts of one stage: rank t holds group ``t % moe_ep`` of them, and part
    ``t // moe_ep`` of each.
    """

    tp: int = 1
    pp: int = 1
    moe_tp: int = 1
    moe_ep: int = 1

    def stage_layers(self, num_layers: int) -> list[range]:
        """Layers of each pipeline stage; the first ones hold one more where they do not divide."""
        small, extra = divmod(num_layers, self.pp)
        stages, first = [], 0
        for stage in range(self.pp):
            count = small + (stage < extra)
            stages.append(range(first, first + count))
            first += count
        return stages


def is_trtllm(raw: Mapping[str, Any]) -> bool:
    """Whether an object is the config.json of a TensorRT-LLM checkpoint or engine."""
    return isinstance(raw.get("architecture"), str) or isinstance(raw.get("pretrained_config"), dict)


def read_trtllm_config(raw: Mapping[str, Any], path: str) -> tuple[dict[str, Any], Ranks]:
    """Hugging Face's config.json of the same model, and how its weights are spread.

    Raises
    ------
    UserError
        It belongs to an engine, its weights are quantized, or the model is not one of the supported families.
    """
    if "pretrained_config" in raw:
        raise UserError(
            f"{path}: a built TensorRT-LLM engine, which holds no weights that can be read",
            "give the checkpoint directory it was built from (config.json and rank0.safetensors), or the Hugging Face "
            "checkpoint",
        )
    family = _family(raw, path)
    fields = JsonFields({"norm_epsilon": 1e-5, "hidden_act": "gelu", **raw}, path)
    _check(fields, family)
    heads, hidden = fields.get("num_attention_heads", int), fields.get("hidden_size", int)
    kv_heads = fields.get("num_key_value_heads", int, optional=True)
    head_size = fields.get("head_size", int, optional=True) or hidden // max(1, heads)
    config: dict[str, Any] = {
        "architectures": list(FAMILIES[family].architectures[:1]),
        "model_type": FAMILIES[family].model_type,
        "dtype": fields.get("dtype", str),
        "vocab_size": fields.get("vocab_size", int),
        "hidden_size": hidden,
        "intermediate_size": fields.get("intermediate_size", int, optional=True) or 4 * hidden,
        "num_hidden_layers": fields.get("num_hidden_layers", int),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_size,
        "hidden_act": "silu",
        "rms_norm_eps": fields.get("norm_epsilon", float),
        "max_position_embeddings": fields.get("max_position_embeddings", int, optional=True) or 2048,
        "tie_word_embeddings": bool(fields.get("tie_word_embeddings", bool, optional=True)),
        "sliding_window": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "phi3":
        config |= {"pad_token_id": 0}
        if head_size * heads == hidden:
            del config["head_dim"]
    if family == "mixtral":
        config |= {"num_local_experts": _moe(raw, "num_experts"), "num_experts_per_tok": _moe(raw, "top_k")}
    if family == "llama":
        config |= {
            name: bool(raw.get(key)) for name, key in (("attention_bias", "attn_bias"), ("mlp_bias", "mlp_bias"))
        }
    if family == "qwen3":
        config["attention_bias"] = False
    return config | _rope(fields, family, head_size), _ranks(fields)


def _family(raw: Mapping[str, Any], path: str) -> str:
    architecture, kind = raw.get("architecture"), raw.get("qwen_type")
    family = _FAMILIES.get(str(architecture))
    if architecture == "QWenForCausalLM" and kind in ("qwen2", "qwen3"):
        family = str(kind)
    if family == "llama" and _moe(raw, "num_experts"):
        family = "mixtral"
    if family is None or (family == "qwen2" and kind not in (None, "qwen2")):
        which = f" of type {kind!r}" if kind is not None else ""
        raise UserError(
            f"{path}: architecture {architecture!r}{which} is not supported",
            f"supported in TensorRT-LLM checkpoints: {', '.join(_FAMILIES)}",
        )
    return family


def _check(fields: JsonFields, family: str) -> None:
    quantization = fields.get("quantization", dict, optional=True) or {}
    algorithm = quantization.get("quant_algo")
    if algorithm is not None:
        raise UserError(
            f"{fields.path}: quantization.quant_algo {algorithm}: quantized TensorRT-LLM checkpoints are not supported",
            "give the unquantized checkpoint (build --weights int4 or int8 rounds it), or the model's GPTQ or AWQ "
            "checkpoint",
        )
    if fields.values["hidden_act"] not in ("silu", "swiglu"):
        raise fields.error("hidden_act", "'silu' or 'swiglu'", fields.values["hidden_act"], "use another checkpoint")
    position = str(fields.values.get("position_embedding_type", "rope_gpt_neox"))
    if position not in ("rope_gpt_neox", "long_rope"):
        raise fields.error("position_embedding_type", "'rope_gpt_neox' or 'long_rope'", position, "use another model")
    for key, neutral in _NEUTRAL.items():
        if fields.values.get(key, neutral[0]) not in (None, *neutral):
            raise fields.error(key, repr(neutral[0]), fields.values[key], "use a checkpoint without it")
    if family == "mixtral" and _moe(fields.values, "normalization_mode", _RENORMALIZE) != _RENORMALIZE:
        raise UserError(f"{fields.path}: moe.normalization_mode: expected {_RENORMALIZE}", "use another checkpoint")
    if fields.values.get("qk_layernorm") and family != "qwen3":
        raise fields.error("qk_layernorm", "false", True, "use a checkpoint without it")
    if family in ("mistral", "mixtral", "phi3", "qwen2", "qwen3"):
        biases = ["mlp_bias"] + ([] if family == "qwen2" else ["attn_bias"])
        for key in biases:
            if fields.values.get(key):
                raise fields.error(key, "false", True, "use a checkpoint without it")


def _moe(raw: Mapping[str, Any], key: str, default: int = 0) -> int:
    """A field of ``moe``, or in checkpoints before that existed, ``moe_<key>``."""
    moe = raw.get("moe")
    value = moe.get(key) if isinstance(moe, dict) else raw.get(f"moe_{key}")
    return value if type(value) is int else default


def _rope(fields: JsonFields, family: str, head_size: int) -> dict[str, Any]:
    theta = fields.get("rotary_base", float, optional=True)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0 if theta is None else theta}
    scaling = fields.get("rotary_scaling", dict, optional=True)
    if scaling:
        kind = scaling.get("rope_type", scaling.get("type"))
        given = {key: value for key, value in scaling.items() if key not in ("type", "rope_theta")}
        rope |= (_LLAMA3_DEFAULTS if kind == "llama3" else {}) | given | {"rope_type": kind}
    result: dict[str, Any] = {"rope_parameters": rope}
    if fields.values.get("position_embedding_type") == "long_rope":
        original = fields.get("original_max_position_embeddings", int)
        factor = fields.get("max_position_embeddings", int) / original
        rope |= {
            "rope_type": "longrope",
            "short_factor": fields.get("longrope_scaling_short_factors", list),
            "long_factor": fields.get("longrope_scaling_long_factors", list),
            "factor": factor,
            "attention_factor": math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0,
            "original_max_position_embeddings": original,
        }
        result["original_max_position_embeddings"] = original
    rotated = fields.get("rotary_embedding_dim", int, optional=True)
    fraction = fields.get("rotary_pct", float, optional=True) or (rotated / head_size if rotated else 1.0)
    if fraction != 1.0:
        if family != "phi3":
            raise fields.error("rotary_pct", "1.0", fraction, "use a checkpoint that rotates whole heads")
        rope["partial_rotary_factor"] = fraction
    return result


def _ranks(fields: JsonFields) -> Ranks:
    mapping = JsonFields(fields.get("mapping", dict, optional=True) or {}, f"{fields.path}: mapping")

    def size(key: str, default: int) -> int:
        value = mapping.get(key, int, optional=True)
        if value in (None, -1):
            return default
        if value < 1:
            raise mapping.error(key, "a positive number", value)
        return int(value)

    tp, pp = size("tp_size", 1), size("pp_size", 1)
    moe_ep = size("moe_ep_size", max(1, tp // size("moe_tp_size", tp)))
    moe_tp = size("moe_tp_size", tp // moe_ep)
    if moe_tp * moe_ep != tp:
        raise mapping.error("moe_tp_size", f"moe_tp_size x moe_ep_size = {tp} (tp_size)", moe_tp)
    if size("moe_cluster_size", 1) != 1:
        raise mapping.error("moe_cluster_size", "1", size("moe_cluster_size", 1), "convert the checkpoint without it")
    return Ranks(tp, pp, moe_tp, moe_ep)
