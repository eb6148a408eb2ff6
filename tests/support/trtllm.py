"""Checkpoints as TensorRT-LLM's conversion scripts write them, from Hugging Face checkpoints.

Written from the format's public description; it shares nothing with the reader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.rope import read_config

State = dict[str, Tensor]


def write_trtllm(
    source: Path,
    directory: Path,
    tp: int = 1,
    pp: int = 1,
    moe_ep: int = 1,
    parallel_embedding: int | None = None,
    **changes: Any,
) -> Path:
    """Convert a one-file Hugging Face checkpoint.

    Parameters
    ----------
    source, directory : Path
    tp, pp, moe_ep : int
        Tensor-parallel size, pipeline stages, and expert-parallel groups within ``tp``.
    parallel_embedding : int, optional
        Axis along which the embedding is split over tensor-parallel ranks.
    changes
        Fields of config.json to set; None removes one.
    """
    hf = read_config(source)
    state = load_file(source / "model.safetensors")
    directory.mkdir()
    config = trtllm_config(hf, tp, pp, moe_ep, parallel_embedding)
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    for rank in range(tp * pp):
        tensors = _rank_tensors(state, hf, config, rank % tp, rank // tp, tp, pp, moe_ep, parallel_embedding)
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, directory / f"rank{rank}.safetensors")
    return directory


def trtllm_config(hf: dict[str, Any], tp: int, pp: int, moe_ep: int, parallel_embedding: int | None) -> dict[str, Any]:
    """The format's config.json of a Hugging Face one (as transformers 5 writes it)."""
    heads, family = hf["num_attention_heads"], hf["model_type"]
    rope = dict(hf["rope_parameters"])
    config: dict[str, Any] = {
        "architecture": hf["architectures"][0],
        "dtype": hf["dtype"],
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": hf["num_key_value_heads"],
        "head_size": hf.get("head_dim") or hf["hidden_size"] // heads,
        "qk_layernorm": family == "qwen3",
        "hidden_act": "swiglu" if family in ("mixtral", "phi3") else "silu",
        "norm_epsilon": hf["rms_norm_eps"],
        "logits_dtype": "float32",
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": hf["max_position_embeddings"],
        "rotary_base": rope["rope_theta"],
        "rotary_scaling": None if rope["rope_type"] == "default" else rope,
        "attn_bias": family == "qwen2" or bool(hf.get("attention_bias")),
        "mlp_bias": bool(hf.get("mlp_bias")),
        "use_parallel_embedding": parallel_embedding is not None,
        "embedding_sharding_dim": parallel_embedding or 0,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp, "cp_size": 1, "gpus_per_node": 8},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    if family.startswith("qwen"):
        config["qwen_type"] = family
    if family == "mixtral":
        config["moe"] = {
            "num_experts": hf["num_local_experts"],
            "top_k": hf["num_experts_per_tok"],
            "normalization_mode": 1,
        }
        config["mapping"] |= {"moe_tp_size": tp // moe_ep, "moe_ep_size": moe_ep}
    if rope.get("partial_rotary_factor"):
        config["rotary_pct"] = rope["partial_rotary_factor"]
    if rope["rope_type"] == "longrope":
        config |= {
            "position_embedding_type": "long_rope",
            "longrope_scaling_short_factors": rope["short_factor"],
            "longrope_scaling_long_factors": rope["long_factor"],
            "original_max_position_embeddings": hf["original_max_position_embeddings"],
            "rotary_scaling": None,
        }
    return config


def _rank_tensors(
    state: State,
    hf: dict[str, Any],
    config: dict[str, Any],
    t: int,
    stage: int,
    tp: int,
    pp: int,
    moe_ep: int,
    parallel_embedding: int | None,
) -> State:
    tensors: State = {}
    layers = torch.tensor_split(torch.arange(hf["num_hidden_layers"]), pp)[stage].tolist()
    for local, layer in enumerate(layers):
        prefix = f"model.layers.{layer}."
        own = {name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)}
        for name, weight in _layer(own, config, t, tp, moe_ep).items():
            tensors[f"transformer.layers.{local}.{name}"] = weight
    embedding = state["model.embed_tokens.weight"]
    if stage == 0:
        whole = _padded(embedding, tp) if parallel_embedding == 0 else embedding
        split = whole if parallel_embedding is None else _part(whole, t, tp, parallel_embedding)
        tensors["transformer.vocab_embedding.weight"] = split
    if stage == pp - 1:
        tensors["transformer.ln_f.weight"] = state["model.norm.weight"]
        tensors["lm_head.weight"] = _part(_padded(state.get("lm_head.weight", embedding), tp), t, tp, 0)
    return tensors


def _layer(own: State, config: dict[str, Any], t: int, tp: int, moe_ep: int) -> State:
    result = {
        "input_layernorm.weight": own["input_layernorm.weight"],
        "post_layernorm.weight": own["post_attention_layernorm.weight"],
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in own:
            result[f"attention.qkv.{kind}"] = _qkv([own[f"self_attn.{n}_proj.{kind}"] for n in "qkv"], config, t, tp)
    if "self_attn.qkv_proj.weight" in own:
        head, kv = config["head_size"], config["num_key_value_heads"]
        sizes = [config["num_attention_heads"] * head, kv * head, kv * head]
        result["attention.qkv.weight"] = _qkv(list(own["self_attn.qkv_proj.weight"].split(sizes)), config, t, tp)
    result["attention.dense.weight"] = _part(own["self_attn.o_proj.weight"], t, tp, 1)
    if "self_attn.o_proj.bias" in own:
        result["attention.dense.bias"] = own["self_attn.o_proj.bias"]
    for part in "qk":
        if f"self_attn.{part}_norm.weight" in own:
            result[f"attention.{part}_layernorm.weight"] = own[f"self_attn.{part}_norm.weight"]
    return result | (_experts(own, config, t, tp, moe_ep) if "moe" in config else _mlp(own, t, tp))


def _mlp(own: State, t: int, tp: int) -> State:
    result = {"mlp.proj.weight": _part(own["mlp.down_proj.weight"], t, tp, 1)}
    if "mlp.down_proj.bias" in own:
        result["mlp.proj.bias"] = own["mlp.down_proj.bias"]
    if "mlp.gate_up_proj.weight" in own:  # Phi-3: the halves change places
        gate, up = own["mlp.gate_up_proj.weight"].chunk(2)
        return result | {"mlp.fc.weight": torch.cat([_part(up, t, tp, 0), _part(gate, t, tp, 0)])}
    for ours, theirs in (("fc", "gate"), ("gate", "up")):
        for kind in ("weight", "bias"):
            if f"mlp.{theirs}_proj.{kind}" in own:
                result[f"mlp.{ours}.{kind}"] = _part(own[f"mlp.{theirs}_proj.{kind}"], t, tp, 0)
    return result


def _experts(own: State, config: dict[str, Any], t: int, tp: int, moe_ep: int) -> State:
    moe = "block_sparse_moe."
    count, moe_tp = config["moe"]["num_experts"] // moe_ep, tp // moe_ep
    group, part = t % moe_ep, t // moe_ep
    experts = range(group * count, (group + 1) * count)
    w1, w2, w3 = (torch.stack([own[f"{moe}experts.{e}.{name}.weight"] for e in experts]) for name in ("w1", "w2", "w3"))
    w1, w3, w2 = _part(w1, part, moe_tp, 1), _part(w3, part, moe_tp, 1), _part(w2, part, moe_tp, 2)
    return {
        "mlp.router.weight": own[f"{moe}gate.weight"].float(),
        "mlp.fc.weight": torch.cat([w3, w1], 1),
        "mlp.proj.weight": w2,
    }


def _qkv(parts: list[Tensor], config: dict[str, Any], t: int, tp: int) -> Tensor:
    """A rank's heads of q, k and v; where there are more ranks than KV heads, several ranks hold the same one."""
    q, *kv = parts
    heads, head = config["num_key_value_heads"], config["head_size"]
    if heads < tp:
        kv = [x.reshape(heads, head, -1).repeat_interleave(tp // heads, 0).reshape(tp * head, -1) for x in kv]
        kv = [x.squeeze(1) if q.dim() == 1 else x for x in kv]
    return torch.cat([_part(x, t, tp, 0) for x in (q, *kv)])


def _padded(weight: Tensor, tp: int) -> Tensor:
    rows = -(-len(weight) // tp) * tp - len(weight)
    return torch.nn.functional.pad(weight, (0, 0, 0, rows))


def _part(weight: Tensor, t: int, tp: int, axis: int) -> Tensor:
    return weight.chunk(tp, axis)[t]
